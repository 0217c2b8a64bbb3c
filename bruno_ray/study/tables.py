"""Trials as tables for people."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from bruno_ray.study.selection import TrialRecord


def metric_text(trial: TrialRecord, name: str) -> str:
    """A rate as the raw count it is (3/100), any other metric with four significant digits."""
    if name in trial.counts:
        cases, total = trial.counts[name]
        return f"{cases}/{total}"
    value = trial.values.get(name)
    return "-" if value is None else f"{value:.4g}"


def describe_edit(edit: dict[str, Any] | None) -> str:
    """One short phrase: direction and, per component, peak strength @ layer."""
    if edit is None:
        return "-"
    index = edit["direction_index"]
    direction = "per layer" if index is None else f"layer {index:.1f}"
    kernels = ", ".join(
        f"{component} {max(kernel['max_weight'], 0.0):.2f}@{kernel['max_weight_position']:.1f}"
        for component, kernel in edit["components"].items()
    )
    return f"{edit['direction_set']} {direction}; {kernels}"


def table_columns(trials: Sequence[TrialRecord], objectives: Sequence[str]) -> list[str]:
    """Objectives first, then what else was counted or measured as a mean."""
    measured = {name: None for trial in trials for name in trial.values}
    extra = [name for name in measured if name not in objectives and not name.startswith(("kl_median", "kl_p95"))]
    return [*objectives, *extra]


def front_table(
    trials: Sequence[TrialRecord], objectives: Sequence[str], title: str = "Pareto front", one_line: bool = False
) -> Table:
    """Rich table of the given trials in the given order; ``one_line`` cuts rows instead of wrapping them."""
    columns = table_columns(trials, objectives)
    table = Table(title=title, title_justify="left")
    table.add_column("trial", justify="right")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("edit", overflow="ellipsis" if one_line else "fold", no_wrap=one_line)
    for trial in trials:
        table.add_row(str(trial.number), *(metric_text(trial, name) for name in columns), describe_edit(trial.edit))
    return table


def front_lines(trials: Sequence[TrialRecord], objectives: Sequence[str]) -> list[str]:
    """The same table as aligned plain text, for logs."""
    columns = table_columns(trials, objectives)
    rows = [["trial", *columns, "edit"]]
    rows += [
        [str(trial.number), *(metric_text(trial, name) for name in columns), describe_edit(trial.edit)]
        for trial in trials
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
