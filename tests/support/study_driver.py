"""A driver process for tests that kill or interrupt one: runs a study with fake workers until it is done.

python -m tests.support.study_driver FOLDER n_trials=24 seconds=0.3 die_at=2 ...
"""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

from bruno_ray.settings import RaySettings, Settings, StudySettings
from bruno_ray.study.run import StudyInterrupted, run_study
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.session import ray_session
from tests.support.fakes import FakeInfo, FakeWorker

CONTEXT = SimpleNamespace(bank={"difference_in_means@0": None, "difference_in_means@1": None})


def settings(n_trials: int = 24, workers: int = 1, batch: int = 4, startup: int = 8, **study) -> Settings:
    return Settings(
        ray=RaySettings(workers=workers, cpus_per_worker=0.5, gpus_per_worker=0, object_store_memory=100 * 1024**2),
        study=StudySettings(name="test", n_trials=n_trials, n_startup_trials=startup, trials_per_batch=batch, **study),
    )


def main(folder: Path, n_trials: int = 24, seconds: float = 0.3, die_at: int = 0, workers: int = 1) -> int:
    wanted = settings(n_trials=n_trials, workers=workers)
    with ray_session(wanted.ray), WorkerPool(FakeWorker, (str(folder), seconds, die_at), wanted.ray) as pool:
        pool.wait_ready()
        print("ready", flush=True)
        try:
            run_study(wanted, pool, CONTEXT, FakeInfo(), folder / "run", {"model": "fake"})
        except StudyInterrupted:
            return 130
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    given = dict(argument.split("=") for argument in sys.argv[2:])
    types = {"n_trials": int, "seconds": float, "die_at": int, "workers": int}
    sys.exit(main(Path(sys.argv[1]), **{name: types[name](value) for name, value in given.items()}))
