"""The same run with several seeds, and how far apart their results are: one study says nothing of its own luck.

runs NAME-seed0, NAME-seed1, ... -> one line per seed -> median and range over the seeds
"""

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from bruno_ray.errors import SettingsError
from bruno_ray.pipeline.choosing import trials_of
from bruno_ray.pipeline.run import resume, run
from bruno_ray.pipeline.steps import find_model, with_name
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import ScoresRecord
from bruno_ray.settings import Settings
from bruno_ray.study.selection import BEHAVIOUR, KL, TrialRecord, pareto_front
from bruno_ray.terminal import console

logger = logging.getLogger(__name__)

BOUNDS = (0.25, 0.5, 1.0)
"""Shares of `selection.max_kl`: the front is compared at these heights."""


@dataclass(frozen=True)
class Repeat:
    """What one seed has come to."""

    name: str
    seed: int
    front: tuple[TrialRecord, ...]
    selected: ScoresRecord | None
    """Of the trial that was taken, on the test prompts if they were asked."""


def repeat(settings: Settings, n: int) -> list[Path]:
    """``n`` runs with seeds from `study.seed` on, one after another; prints their spread.

    A run that is there already is gone on with, or left alone if it has a selected trial. So a command that was
    interrupted can be given again.

    Raises SettingsError without `selection.auto`: nobody is there to pick from each of them.
    """
    if not settings.selection.auto:
        raise SettingsError("--repeats makes several runs unattended: add --auto-select")
    # The name of the first says what all of them share.
    base = with_name(find_model(settings)).study.name
    paths = []
    for seed in range(settings.study.seed, settings.study.seed + n):
        study = settings.study.model_copy(update={"seed": seed, "name": f"{base}-seed{seed}"})
        paths.append(_one(settings.model_copy(update={"study": study}), seed))
    console().print(spread_table([_result(path) for path in paths], settings))
    return paths


def _one(settings: Settings, seed: int) -> Path:
    path = settings.output.directory / str(settings.study.name)
    state = state_of(path)
    logger.info("seed %d: run %s is %s", seed, path.name, state)
    match state:
        case "new":
            return run(settings)
        case "begun":
            return resume(path)
        case "finished":
            return path


def state_of(path: Path) -> Literal["new", "begun", "finished"]:
    """Of one seed's run: it is finished when it has a selected trial."""
    if not (path / "run.json").is_file():
        return "new"
    return "begun" if RunDirectory.open(path).read().selected is None else "finished"


def _result(path: Path) -> Repeat:
    record = RunDirectory.open(path).read()
    trials = trials_of(path, record.settings)
    front = pareto_front(trials, record.settings.scoring.objectives)
    selected = record.selected
    scores = None if selected is None else selected.saved or selected.test or selected.validation
    return Repeat(path.name, record.settings.study.seed, tuple(front), scores)


def spread_table(repeats: Sequence[Repeat], settings: Settings) -> Table:
    """A row per seed, then median and range over the seeds of every column.

    Of the front: the lowest behaviour rate at no more than each of three KL, where both are objectives, or else the
    lowest value of every objective. Of the selected trial: the objectives as they were reported.
    """
    objectives = settings.scoring.objectives
    table = Table(title=f"{len(repeats)} seeds", title_justify="left")
    table.add_column("seed", justify="right")
    columns: list[list[float | None]] = []
    if {BEHAVIOUR, KL} <= set(objectives):
        for share in BOUNDS:
            bound = share * settings.selection.max_kl
            table.add_column(f"front: lowest rate, KL <= {bound:g}", justify="right")
            columns.append([lowest(repeat.front, BEHAVIOUR, bound) for repeat in repeats])
    else:
        for name in objectives:
            table.add_column(f"front: lowest {name.replace('_', ' ')}", justify="right")
            columns.append([min((trial.values[name] for trial in repeat.front), default=None) for repeat in repeats])
    for name in objectives:
        table.add_column(f"selected: {name.replace('_', ' ')}", justify="right")
        columns.append([repeat.selected.values.get(name) if repeat.selected else None for repeat in repeats])
    for i, repeat in enumerate(repeats):
        table.add_row(str(repeat.seed), *(_text(column[i]) for column in columns))
    table.add_section()
    table.add_row("median", *(_over(column, statistics.median) for column in columns))
    table.add_row("lowest", *(_over(column, min) for column in columns))
    table.add_row("highest", *(_over(column, max) for column in columns))
    return table


def lowest(front: Sequence[TrialRecord], metric: str, max_kl: float) -> float | None:
    """The lowest value of a metric among trials of no higher KL; None if there is none."""
    return min((trial.values[metric] for trial in front if trial.values[KL] <= max_kl), default=None)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _over(column: Sequence[float | None], measure: Callable[[Sequence[float]], float]) -> str:
    known = [value for value in column if value is not None]
    return _text(measure(known) if known else None)
