"""Ray, as the rest of the project sees it: a session, and a pool of workers to call methods on.

with ray_session(settings.ray), WorkerPool(ModelWorker, (settings.model, threads), settings.ray) as pool:
    pool.wait_ready()
    info = pool.call("describe")
    for index, residuals in pool.map_shards("residuals", shards): ...
"""

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import cloudpickle
from ray._private.ray_logging import stdout_deduplicator
from ray.exceptions import GetTimeoutError, ObjectLostError, OwnerDiedError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bruno_ray.errors import BrunoError, SettingsError, WorkerError
from bruno_ray.settings import RaySettings
from bruno_ray.workers.broker import FAILED, PoolBroker, WorkerState

logger = logging.getLogger(__name__)

BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml").expanduser()
SMALLEST_STORE = 80 * 1024**2
"""Bytes; Ray refuses a smaller object store."""

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
    # Ray prints a paragraph to stdout for each dead worker; the pool says it in a line. (RAY_DEDUP_LOGS_SKIP_REGEX
    # would do the same, but is read when ray is imported.)
    stdout_deduplicator.skip_re = re.compile("A worker died or was killed|The node with node id")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := cluster_address(settings):
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SettingsError(
                f"no Ray cluster at {address} ({reason}): check ray.address, start it first, or set RAY_AUTH_MODE=token"
                " if it asks for a token"
            ) from error
    else:
        start_local(
            num_cpus=max(os.cpu_count() or 1, math.ceil(settings.workers * settings.cpus_per_worker)),
            object_store_memory=max(settings.object_store_memory, SMALLEST_STORE),
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


class WorkerPool:
    """N workers, each in its own actor, usable as soon as one of them is.

    ``factory(*args)`` builds a worker inside its actor; both must be importable there.
    """

    def __init__(self, factory: Any, args: tuple[Any, ...], settings: RaySettings):
        self.settings = settings
        self._args = args  # actors among them live as long as this does
        threads = str(max(1, int(settings.cpus_per_worker)))
        options = {
            "num_cpus": settings.cpus_per_worker,
            "num_gpus": gpus_per_worker(settings),
            "max_restarts": 0,  # the broker starts a fresh actor instead: it must load the model before it is used
            "runtime_env": {
                "env_vars": {
                    "OMP_NUM_THREADS": threads,
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "MKL_NUM_THREADS": threads,
                    "OPENBLAS_NUM_THREADS": threads,
                    "TOKENIZERS_PARALLELISM": "false",
                }
            },
        }
        self._needs = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.broker = PoolBroker.options(scheduling_strategy=here).remote(
            cloudpickle.dumps((factory, args)), settings.workers, options
        )
        self._events_seen = 0
        self._ask(self.broker.open.remote())

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Wait for the first worker.

        Raises what the worker's constructor raised (ModelError and the like), or WorkerError when none has
        started within ``ray.start_timeout`` seconds.
        """
        total = ray.cluster_resources()
        short = [f"{n:g} {name}" for name, n in self._needs.items() if n > total.get(name, 0)]
        if short:
            logger.warning(
                "no machine of the cluster has %s free for a worker: waiting for it to grow", " and ".join(short)
            )
        try:
            self._ask(self.broker.ready.remote(), timeout=self.settings.start_timeout)
        except GetTimeoutError as error:
            needs = " and ".join(f"{n:g} {name}" for name, n in self._needs.items() if n)
            raise WorkerError(
                f"no worker started within {self.settings.start_timeout:g} s (each needs {needs}; the cluster has"
                f" {total.get('CPU', 0):g} CPU and {total.get('GPU', 0):g} GPU): lower ray.cpus_per_worker or"
                " ray.gpus_per_worker, or raise ray.start_timeout"
            ) from error

    def call(self, method: str, *args: Any, with_context: bool = False) -> Any:
        """Call a method on any one worker and return its result; ``with_context`` puts the context first."""
        return self._fetch(self._submit(method, args, with_context), method, args, with_context)

    def set_context(self, context: Any) -> None:
        """What ``evaluate`` gets as its first argument. It is shipped to each machine once."""
        self._context = ray.put(context)
        self._ask(self.broker.set_context.remote([self._context]))

    def map_shards(self, method: str, shards: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Call ``method(*shard)`` for every shard, spread over the workers; (index, result) as they finish.

        A shard whose worker dies is run again elsewhere, once. At most two shards per worker are in flight, so
        that results do not pile up in the object store. Raises what the method raises.
        """
        todo = iter(enumerate(shards))
        flying: dict[Any, int] = {}
        while True:
            while len(flying) < 2 * self.settings.workers:
                index, shard = next(todo, (None, ()))
                if index is None:
                    break
                flying[self._submit(method, shard)] = index
            if not flying:
                return
            (done, *_), _ = ray.wait(list(flying))
            index = flying.pop(done)
            yield index, self._fetch(done, method, shards[index])

    def snapshot(self) -> list[WorkerState]:
        """State of every worker; logs what has happened to workers since the last time."""
        states, events = self._ask(self.broker.snapshot.remote(self._events_seen), timeout=10)
        self._events_seen += len(events)
        for event in events:
            logger.warning("%s", event)
        return states

    def alive(self) -> int:
        """Workers that are in use or may still start."""
        return sum(state.state != FAILED for state in self.snapshot())

    def cancel(self) -> None:
        """Make all calls that are under way return at once, with WorkerError."""
        with suppress(RayError):
            ray.get(self.broker.cancel.remote(), timeout=5)

    def close(self) -> None:
        if not ray.is_initialized():
            return
        with suppress(RayError):
            ray.get(self.broker.close.remote(), timeout=10)
        ray.kill(self.broker)

    def _submit(self, method: str, args: tuple[Any, ...], with_context: bool = False) -> Any:
        return self.broker.run.remote(method, cloudpickle.dumps(args), with_context)

    def _fetch(self, reply: Any, method: str, args: tuple[Any, ...], with_context: bool = False) -> Any:
        _, (value,) = self._ask(reply)
        try:
            return self._ask(value)
        except (ObjectLostError, OwnerDiedError):  # its machine went away with the finished result
            _, (value,) = self._ask(self._submit(method, args, with_context))
            return self._ask(value)

    def _ask(self, reference: Any, timeout: float | None = None) -> Any:
        """``ray.get`` that raises the project's own errors as they are."""
        try:
            return ray.get(reference, timeout=timeout)
        except RayTaskError as error:
            if isinstance(error.cause, BrunoError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise WorkerError("the pool's broker process died (out of memory?): resume the run") from error
