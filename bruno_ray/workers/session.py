"""A Ray cluster of our own on this machine, or the one that is there already."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.exceptions import RuntimeEnvSetupError

from bruno_ray.errors import SettingsError, first_line
from bruno_ray.progress import phase
from bruno_ray.ray_internals import drop_worker_output
from bruno_ray.settings import RaySettings
from bruno_ray.workers.joining import cluster_address, no_cluster, require_cluster
from bruno_ray.workers.starting import local_options, start_local

BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Join a cluster (``ray.address``, RAY_ADDRESS) or start a local one, and leave as it was found.

    A local cluster dies with this process, whatever kills it (two of Ray's own agents
    look for it for another minute after a ``kill -9``). Raises SettingsError when the cluster cannot be
    reached, WorkerError when a local one cannot be started.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's warning about GPUs of 0-GPU actors
    # Ray prints a paragraph to stdout for each dead worker; the pool says it in a line.
    drop_worker_output("A worker died or was killed|The node with node id")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as stack:
        if address := cluster_address(settings):
            with phase(f"joining the Ray cluster at {address}"):
                require_cluster(settings)
                try:
                    ray.init(address=address, **quiet)
                except RuntimeEnvSetupError as error:
                    raise SettingsError(
                        f"the working directory cannot be sent to the Ray cluster at {address}, as Ray does under `uv"
                        f" run` ({first_line(error)}): set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 if its machines have"
                        " bruno-ray, or start from a smaller folder"
                    ) from error
                except (ConnectionError, RuntimeError, ValueError) as error:
                    raise no_cluster(settings, first_line(error)) from error
        else:
            options = stack.enter_context(local_options())
            with phase("starting Ray"):
                start_local(
                    num_cpus=max(os.cpu_count() or 1, math.ceil(settings.workers * (settings.cpus_per_worker or 1.0))),
                    object_store_memory=settings.object_store_memory,
                    include_dashboard=False,
                    **quiet,
                    **options,
                )
        try:
            yield
        finally:
            with phase("stopping Ray"):
                ray.shutdown()


def cpus_per_worker(settings: RaySettings) -> float:
    """The setting. Otherwise 1, but without GPUs and with nobody else's cluster a share of what this machine has."""
    if settings.cpus_per_worker is not None:
        return settings.cpus_per_worker
    if cluster_address(settings) or gpus_per_worker(settings):
        return 1.0
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return float(max(1, cores // settings.workers))


def gpus_per_worker(settings: RaySettings) -> float:
    """The setting, or 1 if the cluster has a GPU or its autoscaler can add one, else 0."""
    if settings.gpus_per_worker is not None:
        return settings.gpus_per_worker
    if ray.cluster_resources().get("GPU", 0):
        return 1.0
    return 1.0 if cluster_address(settings) and autoscaler_has_gpus(BOOTSTRAP_CONFIG) else 0.0


def autoscaler_has_gpus(config_file: Path) -> bool:
    """Whether a node type that may still be rented has GPUs, by the configuration that `ray up` left on the head.

    Ray knows this only from its own cloud service; without it an empty cluster looks like one that has no GPUs.
    """
    try:
        config = yaml.safe_load(config_file.expanduser().read_text())
    except (OSError, RuntimeError):  # not the head of a cluster with an autoscaler; no home at all
        return False
    types = [node for name, node in config["available_node_types"].items() if name != config.get("head_node_type")]
    return any(node.get("resources", {}).get("GPU", 0) and node.get("max_workers", 1) for node in types)
