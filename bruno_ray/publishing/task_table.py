"""What `bruno-ray evaluate --suite` found, as rows for terminal, report and card."""

from collections.abc import Sequence

from bruno_ray.runs.records import RunRecord, TaskFigure, TaskRecord

HEADER = ("Task", "Metric", "Questions", "Unedited", "Edited", "Difference (95 %)", "Right only unedited / edited")


def task_rows(found: Sequence[TaskRecord]) -> list[tuple[str, ...]]:
    """One per task, under ``HEADER``. Figures that are shares are percentages, differences percentage points."""
    return [_row(record) for record in found]


def of_selected(record: RunRecord) -> list[TaskRecord]:
    """Those of the trial that the run selected."""
    selected = record.selected
    return [found for found in record.evaluations if selected is not None and found.trial == selected.number]


def _row(record: TaskRecord) -> tuple[str, ...]:
    shares = is_share(record)
    metric = record.metric if record.filter == "none" else f"{record.metric}, {record.filter}"
    flips = ""
    if record.p is not None:
        flips = f"{record.only_base} / {record.only_edited}, p = {record.p:.2g}"
    return (
        record.task,
        metric if record.higher_is_better else f"{metric} (lower is better)",
        "" if record.questions is None else str(record.questions),
        _figure(record.base, shares),
        _figure(record.edited, shares),
        _difference(record, shares),
        flips,
    )


def is_share(record: TaskRecord) -> bool:
    """Whether both figures lie between 0 and 1, as accuracies do and perplexities do not."""
    return all(0 <= figure.value <= 1 for figure in (record.base, record.edited))


def _figure(figure: TaskFigure, share: bool) -> str:
    error = figure.stderr
    if share:
        return f"{figure.value:.1%}" + ("" if error is None else f" \u00b1 {100 * error:.1f}")
    return f"{figure.value:.4g}" + ("" if error is None else f" \u00b1 {error:.2g}")


def _difference(record: TaskRecord, share: bool) -> str:
    scale, unit = (100, " pp") if share else (1, "")
    shown = f"{scale * record.difference:+.1f}{unit}" if share else f"{record.difference:+.4g}"
    if record.interval is None:
        return shown
    low, high = (scale * bound for bound in record.interval)
    return f"{shown} ({low:+.1f} to {high:+.1f})" if share else f"{shown} ({low:+.4g} to {high:+.4g})"
