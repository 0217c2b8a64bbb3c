"""The optimisation: Tune fans batches of trials out over the worker pool, the Optuna study keeps the record.

``run_study`` can be called again after anything - a kill, a lost machine, Ctrl-C - and goes on until the target is
reached. The first Ctrl-C asks for no new trials and waits for those under way; the second stops at once, and what
was under way is evaluated by the next run.
"""

import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import psutil
import ray
from optuna.exceptions import StorageInternalError
from ray import tune
from ray.exceptions import RayError
from sqlalchemy.exc import SQLAlchemyError

from bruno_ray.errors import StudyError, WorkerError, first_line
from bruno_ray.settings import Settings
from bruno_ray.settings.passwords import without_password
from bruno_ray.study.lane import BatchLane
from bruno_ray.study.progress import Snapshot, make_view
from bruno_ray.study.sampler import NumberedTPESampler
from bruno_ray.study.searcher import Batch, BatchOptunaSearch
from bruno_ray.study.selection import TrialRecord, load_trials, pareto_front
from bruno_ray.study.space import search_space, suggest
from bruno_ray.study.storage import open_study
from bruno_ray.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

BATCHES_PER_WORKER = 2
"""One is evaluated, one waits, so a worker never waits for Tune and the sampler."""

MOST_SPARE_BATCHES = 4
"""With many workers a few that wait are enough; the sampler does not know yet how those under way end."""

LANES = 2
"""Processes between Tune and the pool: one waits there while the other's results are stored. More would only take
turns: the driver deals with one at a time."""

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files per batch
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a batch reports outcomes, not the searcher's metrics
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # seconds between snapshots that nobody reads
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's would drop the batches under way at the first Ctrl-C
}


class StudyInterrupted(KeyboardInterrupt):
    """Raised by ``run_study`` after Ctrl-C, once everything is stored; the command line exits with code 130."""

    def __init__(self, study: optuna.Study):
        super().__init__("interrupted: resume the run to go on")
        self.study = study


def study_fingerprint(settings: Settings, info: Any, prompts_fingerprint: str) -> dict[str, Any]:
    """What results depend on. Two runs may share a study only if these agree; seeds, numbers of trials and
    workers, batch sizes and places may differ."""
    dump = settings.model_dump(mode="json")
    return {
        "model": {
            "id": settings.model.id,
            "fingerprint": info.fingerprint,
            "dtype": info.dtype,
            "quantization": settings.model.quantization,
        },
        "prompts": prompts_fingerprint,
        "settings": {
            "residuals": {name: dump["residuals"][name] for name in ("max_tokens", "answer_tokens")},
            "directions": dump["directions"],
            "search": dump["search"],
            "scoring": {name: value for name, value in dump["scoring"].items() if name != "row_tokens"},
            "response_prefix": dump["prompts"]["response_prefix"],
        },
    }


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
) -> optuna.Study:
    """Run trials until ``study.n_trials`` are COMPLETE.

    Args:
        context: ``EvaluationContext``; the keys of its ``bank`` are the direction sets that compete.
        info: ``ModelInfo`` (n_layers and components span the search space).
        fingerprint: from ``study_fingerprint``.
        view: makes the progress view from a source of snapshots.

    Raises:
        StudyError: the study cannot be opened or continued, or too many trials failed.
        StudyInterrupted: after Ctrl-C, when the target was not reached.
    """
    direction_sets = tuple(context.bank)
    space = search_space(settings.search, direction_sets, info.n_layers, info.components)
    objectives = settings.scoring.objectives
    name = settings.study.name or run_dir.name
    pool.set_context(context)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with (
        storage_errors(),
        open_study(name, settings.study.storage, run_dir, objectives, fingerprint, settings.study.take_over) as study,
    ):
        search = BatchOptunaSearch(
            study,
            sampler=NumberedTPESampler(settings.study.n_startup_trials, settings.study.seed, tuple(space)),
            suggest=lambda trial: suggest(trial, settings.search, direction_sets, info.n_layers, info.components),
            objectives=objectives,
            target=settings.study.n_trials,
            batch_size=settings.study.trials_per_batch,
            window=window_for(settings.ray.workers),
            workers=settings.ray.workers,
            lanes=LANES,
        )
        monitor = Monitor(search, pool)
        with view(monitor.snapshot) as shown:
            search.on_batch = lambda batch: (monitor.add(batch), shown.batch())
            with interruptible(search, pool):
                if not search.finished:
                    schedule(search, pool)
                search.settle()
    if search.failure is not None:
        raise search.failure
    if not search.finished:
        if search.stopping or search.cancelled:
            raise StudyInterrupted(search.study)
        raise WorkerError("the search ended early: look at the messages above, then resume the run")
    return search.study


def schedule(search: BatchOptunaSearch, pool: WorkerPool) -> None:
    """Let Tune run the search over the pool, leaving nothing on disk."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    place = next(name for name in node["Resources"] if name.startswith("node:") and "head" not in name)
    lane = tune.with_resources(
        tune.with_parameters(BatchLane, broker=pool.broker),
        # Lanes only wait: they take no CPU from the workers, and stay on the driver's machine.
        tune.PlacementGroupFactory([{place: 0.001}]),
    )
    batches = math.ceil((search.target - search.complete) / search.batch_size)
    ray.get(pool.broker.begin_study.remote(min(search.lanes, batches)))
    with tempfile.TemporaryDirectory(prefix="bruno-ray-tune-") as folder, tune_environment(search.lanes):
        tune.Tuner(
            lane,
            tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="study",
                storage_path=folder,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()


@contextmanager
def tune_environment(lanes: int) -> Iterator[None]:
    """Switch off everything of Tune that prints, or writes what nobody reads; start all lanes at once."""
    environment = {**TUNE_ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(lanes)}
    before = {name: os.environ.get(name) for name in environment}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [each.level for each in loggers]
    os.environ.update(environment)
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
            search.stopping = True
            logger.warning("stopping: waiting for the trials under way (Ctrl-C again to stop at once)")
        elif presses == 2:
            search.cancelled = True
            logger.warning("stopping at once: the trials under way will be evaluated when the run is resumed")
            threading.Thread(target=pool.cancel, daemon=True).start()
            if callable(signal.getsignal(signal.SIGUSR1)):  # Tune listens to it: leave the loop, clean up
                signal.raise_signal(signal.SIGUSR1)
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
        raise StudyError(f"the study's storage failed ({reason}): see to it, then resume the run") from error


class Monitor:
    """Makes snapshots of a running study for the progress view. Read from the view's thread."""

    def __init__(self, search: BatchOptunaSearch, pool: WorkerPool):
        self._search = search
        self._pool = pool
        self._records = load_trials(search.study)
        self._started = time.monotonic()
        self._at_start = len(self._complete())
        self._driver = psutil.Process()
        self._workers: tuple[Any, ...] = ()
        self._asked_at = 0.0

    def add(self, batch: Batch) -> None:
        """Take over results that have come back."""
        numbers = set(batch.results)
        kept = [record for record in self._records if record.number not in numbers]
        self._records = kept + [
            TrialRecord(
                number,
                "FAIL" if "error" in result else "COMPLETE",
                batch.edits[number].to_dict(),
                result.get("values", {}),
                {name: tuple(pair) for name, pair in result.get("counts", {}).items()},
                result.get("seconds"),
                result.get("worker"),
                result.get("error"),
            )
            for number, result in batch.results.items()
        ]

    def snapshot(self) -> Snapshot:
        search = self._search
        complete = len(self._complete())
        elapsed = time.monotonic() - self._started
        new = complete - self._at_start
        to_go = max(search.target - complete, 0)
        return Snapshot(
            name=search.study.study_name,
            objectives=tuple(search.objectives),
            target=search.target,
            complete=complete,
            running=search.running,
            failed=sum(record.state == "FAIL" for record in self._records),
            elapsed=elapsed,
            remaining=0.0 if not to_go else elapsed / new * to_go if new else None,
            memory=self._driver.memory_info().rss,
            front=tuple(pareto_front(self._records, search.objectives)),
            workers=self._worker_states(),
            note="stopping" if search.stopping else "",
        )

    def _complete(self) -> list[TrialRecord]:
        return [record for record in self._records if record.state == "COMPLETE"]

    def _worker_states(self) -> tuple[Any, ...]:
        if time.monotonic() - self._asked_at > 1.0:
            try:
                self._workers = tuple(self._pool.snapshot())
            except (RayError, WorkerError):
                logger.debug("the broker did not answer; showing the last known states")
            self._asked_at = time.monotonic()
        return self._workers
