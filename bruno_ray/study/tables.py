"""Trials as tables for people."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from bruno_ray.ablation.edit import PART_NAMES
from bruno_ray.ablation.plan import PREFIX
from bruno_ray.study.selection import TrialRecord, metric_text


def describe_edit(edit: dict[str, Any] | None) -> str:
    """One short phrase: direction and, per component, peak strength @ layer."""
    if edit is None:
        return "-"
    index = edit["direction_index"]
    direction = "per layer" if index is None else f"layer {index:.1f}"
    if edit["direction_set"].startswith(PREFIX):
        direction = "trained"
    kernels = ", ".join(f"{component} {_peak(given)}" for component, given in edit["components"].items())
    parts = ", ".join(
        f"{sum(len(part) for part in chosen if part is not None)} {PART_NAMES[component]}"
        for component, chosen in edit.get("parts", {}).items()
    )
    return f"{edit['direction_set']} {direction}; {kernels}" + (f"; {parts}" if parts else "")


def describe_trial(trial: TrialRecord) -> str:
    """The edit, and where it is from if it was given."""
    return describe_edit(trial.edit) + (f" ({trial.origin})" if trial.origin else "")


def _peak(given: dict[str, Any]) -> str:
    """Strength at the peak, and the layer where that is."""
    if "strengths" in given:
        strength = max(given["strengths"])
        return f"{strength:.2f}@{given['strengths'].index(strength)}"
    shape = given.get("shape", "linear")
    named = "" if shape == "linear" else f" {shape}"
    return f"{max(given['max_weight'], 0.0):.2f}@{given['max_weight_position']:.1f}{named}"


def table_columns(trials: Sequence[TrialRecord], objectives: Sequence[str]) -> list[str]:
    """Objectives first, then what else was counted or measured as a mean."""
    measured = {name: None for trial in trials for name in trial.values}
    extra = [name for name in measured if name not in objectives and not name.startswith(("kl_median", "kl_p95"))]
    return [*objectives, *extra]


def front_table(
    trials: Sequence[TrialRecord],
    objectives: Sequence[str],
    title: str = "Pareto front",
    one_line: bool = False,
    selected: int | None = None,
) -> Table:
    """Rich table of the given trials in the given order; ``one_line`` cuts rows instead of wrapping them, the row of
    the trial ``selected`` is marked."""
    columns = table_columns(trials, objectives)
    table = Table(title=title, title_justify="left")
    table.add_column("trial", justify="right")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("edit", overflow="ellipsis" if one_line else "fold", no_wrap=one_line)
    for trial in trials:
        table.add_row(
            _number(trial, selected),
            *(metric_text(trial, name) for name in columns),
            describe_trial(trial),
            style="bold" if trial.number == selected else None,
        )
    return table


def front_lines(trials: Sequence[TrialRecord], objectives: Sequence[str], selected: int | None = None) -> list[str]:
    """The same table as aligned plain text, for logs."""
    columns = table_columns(trials, objectives)
    rows = [["trial", *columns, "edit"]]
    rows += [
        [_number(trial, selected), *(metric_text(trial, name) for name in columns), describe_trial(trial)]
        for trial in trials
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]


def with_selected(
    front: Sequence[TrialRecord], trials: Sequence[TrialRecord], selected: int | None
) -> list[TrialRecord]:
    """The front, and behind it the selected trial if that is not on the front: objectives are not all that decides."""
    beside = [trial for trial in trials if trial.number == selected and trial not in front]
    return [*front, *beside]


def _number(trial: TrialRecord, selected: int | None) -> str:
    return f"* {trial.number}" if trial.number == selected else str(trial.number)
