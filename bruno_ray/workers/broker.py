"""The actors of the worker pool: one broker, and one worker per model copy.

The broker is a small asynchronous actor on the driver's machine. It starts the workers, replaces those that die,
and hands each call to the next idle worker; a call whose worker dies is run again elsewhere, once. Everything that
asks for work to be done (lanes of the study, the pipeline) talks to the broker, so workers may come and go.

Neither the broker nor the lanes import torch: calls, edits and outcomes pass through them as plain values or as
references to objects they never open.
"""

import asyncio
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import ray
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

from bruno_ray.errors import BrunoError, WorkerError
from bruno_ray.workers.batch_queue import Exchange, Reply

HEARTBEAT_S = 2.0
"""How often a worker is asked for its memory; also how soon the death of an idle worker is noticed."""

LOSSES_IN_A_ROW = 3
"""A worker that dies this many times without finishing a call in between is not started again."""

LANES_START_S, LANE_START_S = 15.0, 1.5
"""Longest time that lanes wait for each other at the start: the first, and the second for each of them, because they
share the cores of one machine."""

ATTEMPTS = 2
"""How many workers a call may lose before it counts as failed."""

STARTING, IDLE, BUSY, LOST, FAILED = "starting", "idle", "busy", "lost", "failed"


@dataclass
class WorkerState:
    """What the progress view shows of one worker."""

    name: str
    state: str = STARTING
    host: str = ""
    pid: int = 0
    memory: int = 0
    """Resident bytes of the process."""

    gpu_memory: int = 0
    """Bytes that torch holds on GPUs."""

    calls: int = 0
    losses: int = 0


@ray.remote(concurrency_groups={"control": 1})
class WorkerActor:
    """Owns one worker object (a ``ModelWorker``) and forwards calls to it."""

    def start(self, payload: bytes) -> None:
        """Build the worker. Apart from ``__init__``, so that its errors arrive as what they are."""
        factory, args = cloudpickle.loads(payload)
        self._worker = factory(*args)

    def call(self, method: str, arguments: bytes, *context: Any) -> tuple[None, Any]:
        """(None, result): with two returns the broker can await the first and pass the second on unopened."""
        return None, getattr(self._worker, method)(*context, *cloudpickle.loads(arguments))

    def evaluate(self, context: Any, edits: list[dict[str, Any]]) -> tuple[None, list[dict[str, Any]]]:
        """Like ``call``, with edits and outcomes as plain dicts."""
        from bruno_ray.ablation.edit import Edit

        outcomes = self._worker.evaluate(context, [Edit.from_dict(edit) for edit in edits])
        return None, [asdict(outcome) for outcome in outcomes]

    @ray.method(concurrency_group="control")
    def stat(self) -> dict[str, Any]:
        """Answered while a call is running, from another thread."""
        gpu_memory = 0
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            gpu_memory = sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count()))
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "memory": psutil.Process().memory_info().rss,
            "gpu_memory": gpu_memory,
        }


class NoWorkerLeft(WorkerError):
    """Every worker has been given up: the call did not fail, there is nobody to run it."""


class Slot:
    """One place in the pool, filled by one actor after another."""

    def __init__(self, name: str):
        self.state = WorkerState(name)
        self.losses_in_a_row = 0
        self.actor: Any = None
        self.lost = asyncio.Event()
        self.reason = ""

    @property
    def name(self) -> str:
        return self.state.name


@ray.remote(num_cpus=0, max_restarts=0)
class PoolBroker:
    """See the module's docstring. All methods run in one event loop, so no state needs a lock."""

    def __init__(self, payload: bytes, n_workers: int, options: dict[str, Any]):
        """
        Args:
            payload: cloudpickle of (factory, arguments); opened in the workers only.
            options: Ray options of every worker actor (num_cpus, num_gpus, runtime_env).
        """
        self._payload = payload
        self._options = options
        self._slots = [Slot(f"worker {i}") for i in range(n_workers)]
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._context: list[Any] = [None]
        self._events: list[str] = []
        self._failure: BrunoError | None = None
        self._first = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._cancelled = asyncio.Event()
        self._lanes_missing = 0
        self._lanes_start_s = LANES_START_S
        self._lanes_here = asyncio.Event()
        self._exchange = Exchange(self.evaluate)

    async def open(self) -> None:
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in self._slots]

    async def ready(self) -> None:
        """Returns once the first worker can be used. Raises what its constructor raised if all have failed."""
        await self._first.wait()
        if self._failure is not None:
            raise self._failure

    async def snapshot(self, events_from: int = 0) -> tuple[list[WorkerState], list[str]]:
        return [slot.state for slot in self._slots], self._events[events_from:]

    async def set_context(self, context: list[Any]) -> None:
        """``context`` is a list with one object reference, which is thus kept and not opened."""
        self._context = context

    async def run(self, method: str, arguments: bytes, with_context: bool = False) -> tuple[str, list[Any]]:
        """Call a method on the next idle worker; ``arguments`` is a cloudpickled tuple, opened in the worker.

        Returns the worker's name and a list with the reference to the result; getting that raises what the method
        raised. Raises WorkerError when the call has lost its worker twice or no worker is left.
        """
        context = self._context if with_context else []
        return await self._run(lambda actor: actor.call.options(num_returns=2).remote(method, arguments, *context))

    async def evaluate(self, edits: list[dict[str, Any]]) -> tuple[str, list[Any]]:
        """``evaluate(context, edits)`` on the next idle worker, as ``run`` does; NoWorkerLeft when there is none."""
        try:
            return await self._run(lambda actor: actor.evaluate.options(num_returns=2).remote(self._context[0], edits))
        except BrunoError as error:
            if error is self._failure:
                raise NoWorkerLeft(f"no worker is left ({error}): see to that, then resume the run") from error
            raise

    async def begin_study(self, lanes: int) -> None:
        """Expect this many lanes, and forget what the last study has left behind."""
        self._exchange = Exchange(self.evaluate)
        self._lanes_missing = lanes
        self._lanes_start_s = LANES_START_S + lanes * LANE_START_S
        self._lanes_here = asyncio.Event()

    async def lane_started(self) -> None:
        self._lanes_missing -= 1
        if self._lanes_missing <= 0:
            self._lanes_here.set()

    async def lanes_started(self) -> None:
        """Returns once all expected lanes have started (or have had time enough).

        A lane must not finish its first trip before: Tune would give its process to the next lane, throw away
        the process that was being started for that one, and go on like this for as long as a trip is faster than
        the start of a process.
        """
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._lanes_here.wait(), self._lanes_start_s)

    async def exchange(self, lane: str, batches: list[tuple[int, Any]], wait: bool, again: bool) -> list[Reply]:
        """See ``Exchange.trip``; a batch is a list of edits, and replies are what ``evaluate`` returns or raises."""
        return await self._exchange.trip(lane, batches, wait, again)

    async def cancel(self) -> None:
        """Calls that wait or run now return WorkerError at once; workers finish what they are at."""
        self._cancelled.set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for slot in self._slots:
            if slot.actor is not None:
                ray.kill(slot.actor)

    # ----- calls -----

    async def _run(self, submit: Callable[[Any], tuple[Any, Any]]) -> tuple[str, list[Any]]:
        work = asyncio.ensure_future(self._attempts(submit))
        cancelled = asyncio.ensure_future(self._cancelled.wait())
        await asyncio.wait((work, cancelled), return_when=asyncio.FIRST_COMPLETED)
        cancelled.cancel()
        if not work.done():
            work.cancel()
            raise WorkerError("the run was stopped before this call came back: resume it to run the call again")
        return work.result()

    async def _attempts(self, submit: Callable[[Any], tuple[Any, Any]]) -> tuple[str, list[Any]]:
        losses = []
        while len(losses) < ATTEMPTS:
            slot = await self._lease(first=bool(losses))
            done, value = submit(slot.actor)
            try:
                await done
            except RayTaskError:
                pass  # the method raised: the caller will see it when it gets the value
            except RayError as error:
                slot.reason = _reason(error)
                losses.append(f"{slot.name} ({slot.reason})")
                slot.state.state = LOST
                slot.lost.set()
                continue
            slot.losses_in_a_row = 0
            slot.state.calls += 1
            slot.state.state = IDLE
            self._deal()
            return slot.name, [value]
        raise WorkerError(f"it lost {' and then '.join(losses)}: look at the memory and logs of the workers")

    async def _lease(self, first: bool) -> Slot:
        """The next idle worker, marked busy. A call that has lost a worker goes before those that have not."""
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        if first:
            self._waiting.appendleft(future)
        else:
            self._waiting.append(future)
        self._deal()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                future.result().state.state = IDLE
                self._deal()
            raise

    def _deal(self) -> None:
        """Pair idle workers with waiting calls; with no worker left, fail the calls."""
        for slot in self._slots:
            if slot.state.state != IDLE:
                continue
            while self._waiting and self._waiting[0].done():
                self._waiting.popleft()
            if not self._waiting:
                break
            slot.state.state = BUSY
            self._waiting.popleft().set_result(slot)
        if self._failure is not None:
            while self._waiting:
                future = self._waiting.popleft()
                if not future.done():
                    future.set_exception(self._failure)

    # ----- workers -----

    async def _keep(self, slot: Slot) -> None:
        """Keep a slot filled until the pool closes or the slot is given up."""
        while True:
            slot.lost.clear()
            slot.state.state = STARTING
            slot.actor = WorkerActor.options(**self._options).remote()
            try:
                await slot.actor.start.remote(self._payload)
                slot.state.state = IDLE
                self._first.set()
                self._deal()
                await self._watch(slot)
                reason = slot.reason
            except RayTaskError as error:  # its constructor raised, and would again
                cause = error.cause
                self._give_up(slot, cause if isinstance(cause, BrunoError) else WorkerError(_reason(error)))
                return
            except RayError as error:
                reason = _reason(error)
            slot.state.state = LOST
            slot.state.losses += 1
            slot.losses_in_a_row += 1
            ray.kill(slot.actor)  # it may be unreachable rather than dead
            if slot.losses_in_a_row >= LOSSES_IN_A_ROW:
                self._give_up(slot, WorkerError(f"{slot.name} died {LOSSES_IN_A_ROW} times in a row ({reason})"))
                return
            self._say(f"{slot.name} is lost ({reason}); starting another in its place")

    async def _watch(self, slot: Slot) -> None:
        """Returns when a call has noticed that the worker is gone, raises RayError when this notices it first."""
        while not slot.lost.is_set():
            stat = await slot.actor.stat.remote()
            for name, value in stat.items():
                setattr(slot.state, name, value)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(slot.lost.wait(), HEARTBEAT_S)

    def _give_up(self, slot: Slot, error: BrunoError) -> None:
        slot.state.state = FAILED
        self._say(f"{slot.name} is given up: {error}")
        if all(other.state.state == FAILED for other in self._slots):
            self._failure = error
            self._first.set()
            self._deal()

    def _say(self, event: str) -> None:
        self._events.append(f"{time.strftime('%H:%M:%S')} {event}")


def _reason(error: BaseException) -> str:
    """What Ray says of a lost worker, without its list of common causes; of a raised error, its own text."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}"
    text = " ".join(str(error).split())
    for marker in ("Worker exit detail: ", "The actor died because "):
        text = text.split(marker)[-1]
    return text.split(" Some common causes")[0][:200].rstrip(". ") or type(error).__name__
