"""A Ray cluster of our own on this machine, or the one that is there already."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml

from bruno_ray.errors import SettingsError, WorkerError, first_line
from bruno_ray.progress import phase
from bruno_ray.ray_internals import drop_worker_output
from bruno_ray.settings import RaySettings

logger = logging.getLogger(__name__)


BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml").expanduser()


STARTS = 3


TIMED_OUT = "timed out during startup"


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Join a cluster (``ray.address``, RAY_ADDRESS) or start a local one, and leave as it was found.

    A local cluster dies with this process, whatever kills it (two of Ray's own agents
    look for it for another minute after a ``kill -9``). Raises SettingsError when the cluster cannot be
    reached.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's warning about GPUs of 0-GPU actors
    # Ray prints a paragraph to stdout for each dead worker; the pool says it in a line.
    drop_worker_output("A worker died or was killed|The node with node id")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := cluster_address(settings):
        try:
            with phase(f"joining the Ray cluster at {address}"):
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SettingsError(
                f"no Ray cluster at {address} ({first_line(error)}): check ray.address, start it first, or set"
                " RAY_AUTH_MODE=token if it asks for a token"
            ) from error
    else:
        with phase("starting Ray"):
            start_local(
                num_cpus=max(os.cpu_count() or 1, math.ceil(settings.workers * (settings.cpus_per_worker or 1.0))),
                object_store_memory=settings.object_store_memory,
                include_dashboard=False,
                **quiet,
            )
    try:
        yield
    finally:
        ray.shutdown()


def start_local(**options: Any) -> None:
    """Start a cluster in this process. Ray gives its own processes 30 s, which a busy machine needs more than once.

    Raises WorkerError when they were not enough STARTS times.
    """
    for left in reversed(range(STARTS)):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:  # Ray has no type of its own for it
            if TIMED_OUT not in str(error):
                raise
            if not left:
                raise WorkerError(
                    f"Ray did not start within 30 s, {STARTS} times: end what else keeps this machine busy, or join a"
                    " cluster with ray.address"
                ) from error
            logger.warning("Ray did not start within 30 s: trying again")


def cluster_address(settings: RaySettings) -> str | None:
    """Of the cluster to join; None for a local one."""
    address = settings.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


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
        config = yaml.safe_load(config_file.read_text())
    except OSError:  # not the head of a cluster with an autoscaler
        return False
    types = [node for name, node in config["available_node_types"].items() if name != config.get("head_node_type")]
    return any(node.get("resources", {}).get("GPU", 0) and node.get("max_workers", 1) for node in types)
