"""What lm-eval wrote for one task: the figure that counts, and its value on every question. Two of them compared."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bruno_ray.errors import OutputError, SettingsError
from bruno_ray.evaluating.suite import Task
from bruno_ray.intervals import mcnemar, mean_difference
from bruno_ray.runs.records import TaskFigure, TaskRecord

METRICS = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc")
"""Looked for in this order where a task of a suite names none."""

Question = tuple[str, int]
"""Name of the task, which may be one of a group, and number of the document."""


@dataclass(frozen=True)
class TaskResult:
    """One model on one task."""

    task: str
    metric: str
    filter: str
    """Of lm-eval: how an answer is taken out of what was generated; `none` where nothing is."""

    value: float
    stderr: float | None
    higher_is_better: bool
    rows: dict[Question, float]
    """Value of each question. Empty where the figure is not their mean."""

    version: str
    """Of lm-eval."""


def read_result(folder: Path, task: Task) -> TaskResult:
    """The result below ``folder``. Raises OutputError if there is none, SettingsError if it lacks the metric."""
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise OutputError(f"lm-eval left no results in {folder}: remove it and evaluate again")
    try:
        data = json.loads(files[-1].read_text(encoding="utf-8"))
        figures = {**data["results"], **data.get("groups", {})}[task.name]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{files[-1]} is not a result of {task.name}: remove {folder} and evaluate again") from error
    metric, chosen_filter = _metric(task, figures)
    value = float(figures[f"{metric},{chosen_filter}"])
    stderr = figures.get(f"{metric}_stderr,{chosen_filter}")
    rows = dict(_rows(files[-1].parent, metric, chosen_filter))
    if not rows or abs(sum(rows.values()) / len(rows) - value) > 1e-6:
        rows = {}
    higher = data.get("higher_is_better", {}).get(task.name, {}).get(metric)
    return TaskResult(
        task=task.name,
        metric=metric,
        filter=chosen_filter,
        value=value,
        stderr=float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
        higher_is_better=higher is not False,
        rows=rows,
        version=str(data.get("lm_eval_version", "unknown")),
    )


def _metric(task: Task, figures: dict[str, Any]) -> tuple[str, str]:
    """Name and filter of the figure that is compared."""
    there = [
        (key.partition(",")[0], key.partition(",")[2])
        for key, value in figures.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    ]
    if task.metric is None:
        wanted = [*METRICS, *(name for name, _ in there)]
        found = [pair for name in wanted for pair in there if pair[0] == name]
    else:
        name, _, chosen = task.metric.partition(",")
        found = [pair for pair in there if pair[0] == name and chosen in ("", pair[1])]
    if not found:
        known = ", ".join(f"{name},{chosen}" for name, chosen in there) or "none"
        raise SettingsError(f"--suite: {task.name} has no metric {task.metric or ''}: name one of {known}")
    return found[0]


def _rows(folder: Path, metric: str, chosen_filter: str) -> Iterator[tuple[Question, float]]:
    for file in sorted(folder.glob("samples_*.jsonl")):
        name = file.stem.removeprefix("samples_").rpartition("_")[0]
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                sample = json.loads(line)
                value = sample.get(metric)
                if sample.get("filter", "none") == chosen_filter and isinstance(value, (bool, int, float)):
                    yield (name, int(sample["doc_id"])), float(value)


def compare(base: TaskResult, edited: TaskResult, suite: str, trial: int | None) -> TaskRecord:
    """Edited minus base, question by question where both were asked the same."""
    record: dict[str, Any] = {
        "suite": suite,
        "task": base.task,
        "metric": base.metric,
        "filter": base.filter,
        "higher_is_better": base.higher_is_better,
        "trial": trial,
        "base": TaskFigure(value=base.value, stderr=base.stderr),
        "edited": TaskFigure(value=edited.value, stderr=edited.stderr),
        "difference": edited.value - base.value,
        "lm_eval": edited.version,
    }
    if base.rows and base.rows.keys() == edited.rows.keys():
        before, after = zip(*((base.rows[question], edited.rows[question]) for question in sorted(base.rows)))
        _, low, high = mean_difference(after, before)
        record |= {"questions": len(before), "interval": (low, high)}
        if {*before, *after} <= {0.0, 1.0}:
            lost, won, p = mcnemar(before, after)
            record |= {"only_base": lost, "only_edited": won, "p": p}
    return TaskRecord.model_validate(record)
