"""How the study scales with workers: simulated evaluations of a fixed time, so that only orchestration is measured.

    python -m benchmarks.scaling [--workers 1 3 64] [--seconds 40] [--batches 4]

Everything but the evaluation is the product's own: broker, actors, lane, Tune, schedule and journal, on one machine.
Efficiency is the time that the evaluations alone would take, divided by the time from the start of the first
evaluation to the return of the last one; the rest is workers that wait. All begin together and take the same time, so
all of them wait at once after their first batch while the driver samples one batch after another; from then on they
come back one by one. The sampler is in its random phase.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import optuna

from benchmarks.results import write_section
from benchmarks.simulated import OBJECTIVES, StampingWorker
from bruno_ray.settings import RaySettings, SearchSettings
from bruno_ray.study import space
from bruno_ray.study.batches import BatchStudy
from bruno_ray.study.run import window_for
from bruno_ray.study.sampler import NumberedTPESampler
from bruno_ray.study.schedule import Schedule
from bruno_ray.study.searcher import BatchOptunaSearch
from bruno_ray.study.storage import open_study
from bruno_ray.study.tuner import run_tuner
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.session import ray_session
from bruno_ray.workers.worker_actor import IDLE

TRIALS_PER_BATCH = 8
SPACE = (SearchSettings(), ("a", "b"), 32, ("attention", "mlp"))
"""What `search_space` makes one of."""


def measure(workers: int, seconds: float, batches: int) -> tuple[float, float]:
    """(seconds until all workers are there, seconds from the start of the first batch to the return of the last)."""
    with tempfile.TemporaryDirectory() as folder:
        return measure_in(Path(folder), workers, seconds, batches)


def measure_in(folder: Path, workers: int, seconds: float, batches: int) -> tuple[float, float]:
    stamp = folder / "first"
    settings = RaySettings(workers=workers, cpus_per_worker=0.02, gpus_per_worker=0, object_store_memory=100 * 1024**2)
    told: list[float] = []
    with ray_session(settings), WorkerPool(StampingWorker, (seconds, stamp), settings) as pool:
        start = time.perf_counter()
        pool.wait_ready()
        while sum(state.state == IDLE for state in pool.snapshot()) < workers:
            time.sleep(0.2)
        ready = time.perf_counter() - start
        pool.set_context(SimpleNamespace(bank={}))
        with open_study("s", None, folder, OBJECTIVES, {}) as study:
            sampler = NumberedTPESampler(n_startup_trials=10**9, seed=0, space=space.search_space(*SPACE))
            schedule = Schedule(
                BatchStudy(study, sampler, lambda trial: space.suggest(trial, *SPACE), OBJECTIVES),
                target=TRIALS_PER_BATCH * batches * workers,
                batch_size=TRIALS_PER_BATCH,
                window=window_for(workers),
                workers=workers,
                on_batch=lambda batch: told.append(time.time()),
            )
            run_tuner(BatchOptunaSearch(schedule), pool)
            assert schedule.complete == schedule.target
            numbers = [trial.number for trial in study.get_trials(deepcopy=False)]
            assert numbers == list(range(schedule.target)), "every trial once"
    return ready, told[-1] - stamp.stat().st_mtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 3, 64])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--batches", type=int, default=4, help="per worker")
    arguments = parser.parse_args()
    logging.getLogger("bruno_ray").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []
    for workers in arguments.workers:
        ready, took = measure(workers, arguments.seconds, arguments.batches)
        ideal = arguments.seconds * arguments.batches
        rows.append(f"| {workers} | {workers * arguments.batches} | {ready:.0f} | {took:.1f} | {ideal / took:.0%} |")
        print(rows[-1], flush=True)
    write_section(
        "scaling",
        "## Scaling with workers (`python -m benchmarks.scaling`)\n\n"
        f"Simulated evaluations of {arguments.seconds:g} s, {TRIALS_PER_BATCH} trials a batch, {arguments.batches}"
        " batches per worker; driver, broker, lane and workers on one machine.\n\n"
        "| workers | batches | s until all are there | s from first start to last return | efficiency |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows),
    )


if __name__ == "__main__":
    main()
