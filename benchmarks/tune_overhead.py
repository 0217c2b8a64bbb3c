"""What Tune costs: batches of no-op trials through Tune's lane, against a plain loop over the same pool.

    python -m benchmarks.tune_overhead [--batches 40]

Both use the same schedule (Optuna, the journal, the order of telling), broker and worker, so the difference is
Tune's. A batch's time is that from the first batch back to the last, divided by the batches between; the time to
the first batch back is given apart. The sampler is in its random phase; how long TPE takes is in ``sampler.py``.
"""

import argparse
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import optuna
import ray

from benchmarks.results import write_section
from benchmarks.simulated import OBJECTIVES, SleepingWorker
from bruno_ray.ablation.edit import Edit
from bruno_ray.settings import RaySettings, SearchSettings
from bruno_ray.study import space
from bruno_ray.study.batches import Batch, BatchStudy
from bruno_ray.study.lane import batch_result
from bruno_ray.study.run import window_for
from bruno_ray.study.sampler import NumberedTPESampler
from bruno_ray.study.schedule import Schedule
from bruno_ray.study.searcher import BatchOptunaSearch
from bruno_ray.study.storage import open_study
from bruno_ray.study.tuner import run_tuner
from bruno_ray.workers.messages import EditOutcome, Scored
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.session import ray_session

SETTINGS = RaySettings(workers=1, cpus_per_worker=0.5, gpus_per_worker=0, object_store_memory=100 * 1024**2)
SPACE = (SearchSettings(), ("a", "b"), 32, ("attention", "mlp"))
"""What `search_space` makes one of."""

SECONDS = (0.0, 1.0)
"""How long a batch takes in the worker: nothing, and what a small model takes."""


def make_schedule(study: optuna.Study, batch_size: int, batches: int, on_batch: Callable[[Batch], None]) -> Schedule:
    sampler = NumberedTPESampler(n_startup_trials=10**9, seed=0, space=space.search_space(*SPACE))
    return Schedule(
        BatchStudy(study, sampler, lambda trial: space.suggest(trial, *SPACE), OBJECTIVES),
        target=batch_size * batches,
        batch_size=batch_size,
        window=window_for(SETTINGS.workers),
        workers=SETTINGS.workers,
        on_batch=on_batch,
    )


def through_tune(schedule: Schedule, pool: WorkerPool) -> None:
    run_tuner(BatchOptunaSearch(schedule), pool)


def plain_loop(schedule: Schedule, pool: WorkerPool) -> None:
    """Take what is due, submit it to the broker, ``ray.wait``, bring it back: what Tune does, without Tune."""
    flying: dict[ray.ObjectRef, int] = {}
    while (due := schedule.take_due()) or flying:
        for batch in due:
            flying[pool.broker.evaluate.remote(edits_of(batch))] = batch.batch_id
        (done, *_), _ = ray.wait(list(flying))
        schedule.bring(flying.pop(done), batch_result(ray.get(done)))


def without_ray(schedule: Schedule, pool: None) -> None:
    outcome = EditOutcome({"behaviour_rate": 0.5, "kl_divergence": 0.1})
    while due := schedule.take_due():
        for batch in due:
            schedule.bring(batch.batch_id, Scored("nobody", (outcome,) * len(batch.edits)))


def edits_of(batch: Batch) -> Sequence[Edit]:
    return tuple(batch.edits[number] for number in batch.missing)


def measure(
    run: Callable[[Schedule, WorkerPool | None], None], pool: WorkerPool | None, batch_size: int, batches: int
) -> tuple[float, float]:
    """(seconds to the first batch back, seconds per further batch)."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder, open_study("s", None, Path(folder), OBJECTIVES, {}) as study:
        schedule = make_schedule(study, batch_size, batches, lambda batch: times.append(time.perf_counter()))
        start = time.perf_counter()
        run(schedule, pool)
        assert schedule.complete == batch_size * batches
    return times[0] - start, (times[-1] - times[0]) / (batches - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=40)
    batches = parser.parse_args().batches
    logging.getLogger("bruno_ray").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []
    with ray_session(SETTINGS):
        for seconds in SECONDS:
            n = batches if seconds == 0 else max(5, math.ceil(batches / 4))
            with WorkerPool(SleepingWorker, (seconds,), SETTINGS) as pool:
                pool.wait_ready()
                pool.set_context(SimpleNamespace(bank={}))
                for size in (1, 8, 16):
                    _, alone = measure(without_ray, None, size, n)
                    _, loop = measure(plain_loop, pool, size, n)
                    first, tune = measure(through_tune, pool, size, n)
                    over = tune - seconds
                    rows.append(
                        f"| {seconds:g} | {size} | {1000 * alone:.0f} | {1000 * (loop - seconds):.0f} |"
                        f" {1000 * over:.0f} | {1000 * over / size:.1f} | {first - seconds:.1f} |"
                    )
                    print(rows[-1], flush=True)
    head = (
        "| s per batch in the worker | trials per batch | ask + tell + journal, ms | plain loop, ms over | Tune, ms"
        " over | Tune, ms over per trial | Tune, s to the first batch |\n|---|---|---|---|---|---|---|"
    )
    write_section(
        "tune_overhead",
        "## Overhead of Tune (`python -m benchmarks.tune_overhead`)\n\nTime per batch beyond what the worker sleeps,"
        " one worker; one process each for driver, broker, worker and lane.\n\n" + "\n".join([head, *rows]),
    )


if __name__ == "__main__":
    main()
