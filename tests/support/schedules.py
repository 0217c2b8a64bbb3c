"""Schedules of small studies, for tests that drive one without Tune and Ray."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import optuna
import pytest

from bruno_ray.ablation.edit import Edit
from bruno_ray.settings import SearchSettings
from bruno_ray.settings.schema import SamplerName
from bruno_ray.study.batches import BatchStudy
from bruno_ray.study.samplers import make_sampler
from bruno_ray.study.schedule import Schedule
from bruno_ray.study.space import search_space, suggest
from bruno_ray.study.starts import Start, given_first, kept_starts, nearest_params
from bruno_ray.study.storage import open_study

OBJECTIVES = ("behaviour_rate", "kl_divergence")
SPACE = (SearchSettings(), ("a", "b"), 8, ("attention", "mlp"))


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory, where there is one: a journal syncs every write, and none of these tests pulls a plug."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    with in_memory() as folder:
        yield folder


def opened(folder: Path, url: str | None = None) -> AbstractContextManager[optuna.Study]:
    return open_study("test", url, folder, OBJECTIVES, {"model": "A"})


def make_schedule(
    study: optuna.Study,
    window: int = 2,
    workers: int = 1,
    target: int = 30,
    batch_size: int = 4,
    n_startup_trials: int = 8,
    starts: Sequence[Start] = (),
    prune: bool = False,
    suggested: Callable[[optuna.Trial], Edit] = lambda trial: suggest(trial, *SPACE),
    sampler: SamplerName = "tpe",
) -> Schedule:
    space, kept = search_space(*SPACE), kept_starts(study, starts)
    made = make_sampler(
        sampler, n_startup_trials, seed=3, space=space, starts=[nearest_params(start.edit, space) for start in kept]
    )
    first_given = given_first(kept, made.is_start, suggested)
    return Schedule(
        BatchStudy(study, made, first_given, OBJECTIVES, prune=prune),
        target=target,
        batch_size=lambda _: batch_size,
        window=window,
        workers=workers,
    )


def params(study: optuna.Study) -> list[dict]:
    return [trial.params for trial in study.get_trials(deepcopy=False)]
