"""Ray, as the rest of the project sees it: a session, and a pool of workers to call methods on.

with ray_session(settings.ray), WorkerPool(ModelWorker, (settings.model, threads), settings.ray) as pool:
    pool.wait_ready()
    info = pool.call("describe")
    for index, residuals in pool.map_shards("residuals", shards): ...
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, ObjectLostError, OwnerDiedError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bruno_ray.errors import BrunoError, WorkerError
from bruno_ray.progress import phase
from bruno_ray.settings import RaySettings
from bruno_ray.workers.broker import PoolBroker
from bruno_ray.workers.messages import CallReply
from bruno_ray.workers.session import cpus_per_worker, gpus_per_worker
from bruno_ray.workers.worker_actor import FAILED, IDLE, WorkerState

logger = logging.getLogger(__name__)

TO_SHOW_S = 3.0
"""A line is due every ten seconds and does not wait longer for what the workers are at."""


class WorkerPool:
    """N workers, each in its own actor, usable as soon as one of them is.

    ``factory(*args)`` builds a worker inside its actor; both must be importable there.
    """

    def __init__(self, factory: Any, args: tuple[Any, ...], settings: RaySettings):
        self.settings = settings
        self._args = args  # actors among them live as long as this does
        cpus = cpus_per_worker(settings)
        threads = str(max(1, int(cpus)))
        options = {
            "num_cpus": cpus,
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
        with phase("starting workers"):
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
            with phase("starting workers", self.progress):
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
        """What ``evaluate`` gets as its first argument. It is sent to each worker once."""
        self._ask(self.broker.set_context.remote(cloudpickle.dumps(context)))

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

    def snapshot(self, timeout: float = 10.0) -> list[WorkerState]:
        """State of every worker; logs what has happened to workers since the last time.

        Raises RayError if the broker does not answer within ``timeout`` seconds.
        """
        states, events = self._ask(self.broker.snapshot.remote(self._events_seen), timeout=timeout)
        self._events_seen += len(events)
        for event in events:
            logger.warning("%s", event)
        return states

    def progress(self) -> str:
        """What the workers are at, for a log."""
        try:
            states = self.snapshot(TO_SHOW_S)
        except (RayError, WorkerError):
            return ""
        return "; ".join(f"{state.name} {state.doing or state.state}" for state in states if state.state != IDLE)

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
        called: CallReply = self._ask(reply)
        try:
            return self._ask(called.result[0])
        except (ObjectLostError, OwnerDiedError):  # its machine went away with the finished result
            called = self._ask(self._submit(method, args, with_context))
            return self._ask(called.result[0])

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
