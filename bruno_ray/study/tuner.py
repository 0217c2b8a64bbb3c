"""Tune, as this project uses it: it moves one light process, the lane, and records nothing."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import tune

from bruno_ray.study.lane import BatchLane
from bruno_ray.study.searcher import BatchOptunaSearch
from bruno_ray.workers.pool import WorkerPool

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files per batch
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a swap reports results of batches, not the searcher's metrics
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # seconds between snapshots that nobody reads
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's would drop the batches under way at the first Ctrl-C
}


def run_tuner(search: BatchOptunaSearch, pool: WorkerPool) -> None:
    """Let Tune run the search over the pool, leaving nothing on disk."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    place = next(name for name in node["Resources"] if name.startswith("node:") and "head" not in name)
    lane = tune.with_resources(
        tune.with_parameters(BatchLane, broker=pool.broker),
        # The lane only waits: it takes no CPU from the workers, and stays on the driver's machine.
        tune.PlacementGroupFactory([{place: 0.001}]),
    )
    ray.get(pool.broker.begin_study.remote())
    with tempfile.TemporaryDirectory(prefix="bruno-ray-tune-") as folder, quiet_tune():
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
def quiet_tune() -> Iterator[None]:
    """Switch off everything of Tune that prints, or writes what nobody reads."""
    before = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [each.level for each in loggers]
    os.environ.update(TUNE_ENVIRONMENT)
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
