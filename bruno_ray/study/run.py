"""The optimisation: Tune fans batches of trials out over the worker pool, the Optuna study keeps the record.

``run_study`` can be called again after anything - a kill, a lost machine, Ctrl-C - and goes on until the target is
reached. The first Ctrl-C asks for no new trials and waits for those under way; the second stops at once, and what
was under way is evaluated by the next run.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from bruno_ray.ablation.edit import Edit, direction_sets_of
from bruno_ray.ablation.plan import TrainedEdit, TrainingPlan
from bruno_ray.errors import StudyError, WorkerError, first_line
from bruno_ray.ray_internals import stop_tuner
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings import Settings
from bruno_ray.settings.passwords import without_password
from bruno_ray.study.batches import BatchStudy
from bruno_ray.study.monitor import Monitor
from bruno_ray.study.progress import Snapshot, make_view
from bruno_ray.study.pruning import can_prune
from bruno_ray.study.samplers import make_sampler
from bruno_ray.study.schedule import Schedule
from bruno_ray.study.searcher import BatchOptunaSearch
from bruno_ray.study.selection import load_trials, pareto_front
from bruno_ray.study.space import bound_lines, edited_components, search_space, suggest
from bruno_ray.study.starts import (
    LITERATURE,
    Start,
    each_once,
    fitted,
    given_first,
    kept_starts,
    literature_edit,
    nearest_params,
)
from bruno_ray.study.storage import open_study
from bruno_ray.study.trainings import Trainings
from bruno_ray.study.tuner import run_tuner
from bruno_ray.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

BATCHES_PER_WORKER = 2
"""One is evaluated, one waits, so a worker never waits for Tune and the sampler."""

TRIALS_PER_BATCH = 8
BUSY_PARAMETERS = 50_000_000

MOST_SPARE_BATCHES = 4
"""With many workers a few that wait are enough; the sampler does not know yet how those under way end."""


class StudyInterrupted(KeyboardInterrupt):
    """Raised by ``run_study`` after Ctrl-C, once everything is stored; the command line exits with code 130."""

    def __init__(self, study: optuna.Study):
        super().__init__("interrupted: resume the run to go on")
        self.study = study


def trials_per_batch(settings: Settings, info: Any) -> int:
    """The setting, or what the worker's device makes of it.

    A batch of trials shares what a GPU and a small model leave idle. A CPU that computes all the time gains nothing by
    it, and the first results come later, to the sampler too (SmolLM2: 15.1 s a trial one by one, 13.7 s in eights).
    """
    if settings.study.trials_per_batch is not None:
        return settings.study.trials_per_batch
    return 1 if info.device == "cpu" and info.n_parameters >= BUSY_PARAMETERS else TRIALS_PER_BATCH


def window_for(workers: int) -> int:
    """Batches asked and not yet told, at most."""
    return min(BATCHES_PER_WORKER * workers, workers + MOST_SPARE_BATCHES)


def run_study(
    settings: Settings,
    pool: WorkerPool,
    context: Any,
    info: Any,
    run_dir: Path,
    fingerprint: dict[str, Any],
    view: Callable[[Callable[[], Snapshot]], Any] = make_view,
    starts: Sequence[Start] = (),
) -> optuna.Study:
    """Run trials until ``study.n_trials`` are COMPLETE.

    Args:
        context: ``EvaluationContext``; the keys of its ``bank`` are the direction sets that compete, and its
            ``choices`` the experts and heads.
        info: ``ModelInfo`` (n_layers and components span the search space).
        fingerprint: from ``study_fingerprint``.
        view: makes the progress view from a source of snapshots.
        starts: edits to try first, in a study that is begun.

    Raises:
        StudyError: the study cannot be opened or continued, or too many trials failed.
        WorkerError: no worker is left, or Tune's processes keep dying.
        StudyInterrupted: after Ctrl-C, when the target was not reached.
    """
    objectives = settings.scoring.objectives
    name = settings.study.name or run_dir.name
    run = RunDirectory(run_dir)
    pool.set_context(context)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with (
        storage_errors(),
        open_study(name, settings.study.storage, run_dir, objectives, fingerprint, settings.study.take_over) as study,
    ):
        schedule = make_schedule(
            settings,
            study,
            context,
            info,
            keep=lambda trained: run.save_learned(trained.edit.direction_set, trained.directions),
            starts=starts,
        )
        search = BatchOptunaSearch(schedule)
        monitor = Monitor(schedule, pool)
        with view(monitor.snapshot) as shown:
            schedule.on_batch = lambda batch: (monitor.add(batch), shown.batch())
            with interruptible(search, pool):
                if not schedule.finished:
                    run_tuner(search, pool)
                schedule.settle()
    front = pareto_front(load_trials(study), objectives)
    space, params = space_of(settings, context, info), [trial.params for trial in front]
    for line in bound_lines(settings.search, space, params, info.n_layers):
        logger.warning("%s", line)
    if schedule.failure is not None:
        raise schedule.failure
    if not schedule.finished:
        if schedule.stopping:
            raise StudyInterrupted(study)
        raise WorkerError("the search ended early: look at the messages above, then resume the run")
    return study


def space_of(settings: Settings, context: Any, info: Any) -> dict[str, BaseDistribution]:
    """What searched trials are sampled from."""
    components = edited_components(settings.search, info)
    return search_space(
        settings.search, direction_sets_of(context.bank), info.n_layers, components, getattr(context, "choices", {})
    )


def make_schedule(
    settings: Settings,
    study: optuna.Study,
    context: Any,
    info: Any,
    keep: Callable[[TrainedEdit], None] = lambda trained: None,
    starts: Sequence[Start] = (),
) -> Schedule:
    """The schedule of an open study: sampler, starts and trainings as the settings say. Arguments as of `run_study`;
    ``keep`` as of `BatchStudy`."""
    direction_sets, choices = direction_sets_of(context.bank), getattr(context, "choices", {})
    components = edited_components(settings.search, info)
    space = space_of(settings, context, info)
    training = getattr(context, "training", None)
    answered = training is not None and any(prompt.answer for prompt in training.target)
    protected = training is not None and bool(training.protected)
    scored = [getattr(context, side, ()) for side in ("target", "baseline")]
    trainings = Trainings(settings, direction_sets, info.n_layers, answered, protected, sum(map(len, scored)))
    wanted = []
    if settings.study.literature_first:
        wanted.append(Start(literature_edit(direction_sets, info.n_layers, info.components), LITERATURE))
    wanted += [fitted(start, direction_sets, info.n_layers, components) for start in starts]
    starts = kept_starts(study, each_once(wanted))
    sampler = make_sampler(
        settings.study.sampler,
        settings.study.n_startup_trials,
        settings.study.seed,
        space,
        trainings,
        [nearest_params(start.edit, space) for start in starts],
    )

    def suggested(trial: optuna.Trial) -> Edit | TrainingPlan:
        if trainings.is_trained(trial.number):
            return trainings.plan(trial)
        return suggest(trial, settings.search, direction_sets, info.n_layers, components, choices)

    suggest_all = given_first(starts, sampler.is_start, suggested)
    batches = BatchStudy(study, sampler, suggest_all, settings.scoring.objectives, keep, can_prune(settings))
    batches.restore()
    usual = trials_per_batch(settings, info)
    return Schedule(
        batches,
        target=settings.study.n_trials,
        batch_size=lambda number: trainings.batch_size(number, usual),
        window=window_for(settings.ray.workers),
        workers=settings.ray.workers,
        cost=trainings.cost,
    )


@contextmanager
def interruptible(search: BatchOptunaSearch, pool: WorkerPool) -> Iterator[None]:
    """Ctrl-C once: finish what is under way. Twice: stop now. Three times: KeyboardInterrupt wherever we are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    presses = 0

    def pressed(signum: int, frame: Any) -> None:
        nonlocal presses
        presses += 1
        if presses == 1:
            search.schedule.stopping = True
            logger.warning("stopping: waiting for running trials (Ctrl-C again to stop at once)")
        elif presses == 2:
            search.cancelled = True
            logger.warning("stopping at once: unfinished trials will be evaluated when the run is resumed")
            threading.Thread(target=pool.cancel, daemon=True).start()
            stop_tuner()
        else:
            raise KeyboardInterrupt

    interrupt = signal.signal(signal.SIGINT, pressed)
    user = signal.getsignal(signal.SIGUSR1)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, user)
        signal.signal(signal.SIGINT, interrupt)


@contextmanager
def storage_errors() -> Iterator[None]:
    """A storage that goes away in mid-study is one line, not a traceback."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        reason = first_line(without_password(str(error.__cause__ or error)))
        raise StudyError(f"the study's storage failed ({reason}): fix it, then run `bruno-ray resume`") from error
