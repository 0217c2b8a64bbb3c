"""The broker of the worker pool: a small asynchronous actor on the driver's machine.

It starts the workers, replaces those that die, and hands each call to the next idle worker; a call whose worker dies is
run again elsewhere, once. Everything that asks for work to be done (the study's lane, the pipeline) talks to the
broker, so workers may come and go. One worker's place:

                       a call                 its actor dies              three times in a row
    starting ---> idle <-----> busy       (any) ------------> lost ------------------------------> failed
        |                                   ^                  |                                     ^
        |                                   +--- starting <----+                                     |
        +--------------------------------------------------------------------------------------------+
                              its constructor has raised an error, and would again

Neither the broker nor the lane imports torch: calls, edits and outcomes pass through them as plain values or as
references to objects that they never open.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.plan import TrainingPlan
from bruno_ray.errors import BrunoError, WorkerError
from bruno_ray.workers.batch_queue import BatchQueue
from bruno_ray.workers.idle_queue import IdleQueue
from bruno_ray.workers.messages import CallReply, Reply, Swap
from bruno_ray.workers.worker_actor import BUSY, FAILED, IDLE, LOST, STARTING, WorkerActor, WorkerState

HEARTBEAT_S = 2.0
"""How often a worker is asked for its memory; also how soon the death of an idle worker is noticed."""

LOSSES_IN_A_ROW = 3
"""A worker that dies this many times without finishing a call in between is not started again."""

ATTEMPTS = 2
"""How many workers a call may lose before it counts as failed."""

STOPPED = "the run was stopped before this call came back: resume it to run the call again"

Submit = Callable[[Any], tuple[Any, Any]]
"""Starts a call on an actor; returns a reference that is ready when the call is over, and one to its result."""


class NoWorkerLeft(WorkerError):
    """Every worker has been given up: the call did not fail, there is nobody to run it."""


@dataclass(frozen=True)
class _WorkerDied:
    """How a call may end."""

    reason: str


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
        self._idle: IdleQueue[Slot] = IdleQueue()
        self._context: list[Any] = [None]
        self._events: list[str] = []
        self._failure: BrunoError | None = None
        self._stopped = False
        self._first = asyncio.Event()
        self._keepers: list[asyncio.Task[None]] = []
        self._calls: set[asyncio.Task[CallReply]] = set()
        self._in_use: set[asyncio.Task[CallReply | _WorkerDied]] = set()  # the event loop alone does not keep tasks
        self._batches = BatchQueue(self.evaluate)

    async def open(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in self._slots]

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

    async def run(self, method: str, arguments: bytes, with_context: bool = False) -> CallReply:
        """Call a method on the next idle worker; ``arguments`` is a cloudpickled tuple, opened in the worker.

        Raises WorkerError when the call has lost its worker twice or no worker is left.
        """
        context = self._context if with_context else []
        return await self._call(lambda actor: actor.call.options(num_returns=2).remote(method, arguments, *context))

    async def evaluate(self, edits: Sequence[Edit | TrainingPlan]) -> CallReply:
        """``evaluate(context, edits)`` on the next idle worker, as ``run`` does; NoWorkerLeft when there is none."""
        try:
            return await self._call(lambda actor: actor.evaluate.options(num_returns=2).remote(self._context[0], edits))
        except BrunoError as error:
            if error is self._failure:
                raise NoWorkerLeft(f"no worker is left ({error}): see to that, then resume the run") from error
            raise

    async def begin_study(self) -> None:
        """Forget the batches of the last study."""
        self._batches = BatchQueue(self.evaluate)

    async def swap(self, swap: Swap) -> list[Reply]:
        """See ``BatchQueue``; replies are what ``evaluate`` returns or raises."""
        return await self._batches.swap(swap)

    async def cancel(self) -> None:
        """Calls that wait or run now return WorkerError at once, and so do later ones; workers finish what they do."""
        self._stopped = True
        self._idle.fail(WorkerError(STOPPED))
        for call in self._calls:
            call.cancel()

    async def close(self) -> None:
        for task in self._keepers:
            task.cancel()
        for slot in self._slots:
            if slot.actor is not None:
                ray.kill(slot.actor)

    # ----- calls -----

    async def _call(self, submit: Submit) -> CallReply:
        call = asyncio.create_task(self._attempts(submit))
        self._calls.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            if self._stopped:
                raise WorkerError(STOPPED) from None
            raise
        finally:
            self._calls.discard(call)

    async def _attempts(self, submit: Submit) -> CallReply:
        losses: list[str] = []
        while len(losses) < ATTEMPTS:
            slot = await self._idle.get(urgent=bool(losses))
            slot.state.state = BUSY
            use = asyncio.create_task(self._use(slot, submit))
            self._in_use.add(use)
            use.add_done_callback(self._in_use.discard)
            end = await asyncio.shield(use)  # a call that is cancelled stops waiting; its worker is busy all the same
            if isinstance(end, CallReply):
                return end
            losses.append(f"{slot.name} ({end.reason})")
        raise WorkerError(f"it lost {' and then '.join(losses)}: look at the memory and logs of the workers")

    async def _use(self, slot: Slot, submit: Submit) -> CallReply | _WorkerDied:
        """Run a call on the slot's worker. However it ends, the slot is then idle again or about to be filled anew."""
        actor = slot.actor
        try:
            done, result = submit(actor)
            # The method raised, or the call was cancelled: the caller will see it when it gets the result.
            with suppress(RayTaskError, TaskCancelledError):
                await done
            slot.losses_in_a_row = 0
            slot.state.calls += 1
            return CallReply(slot.name, [result])
        except RayError as error:
            if slot.actor is actor:  # else the slot has been filled anew already
                slot.reason = _reason(error)
                slot.state.state = LOST
                slot.lost.set()
            return _WorkerDied(_reason(error))
        finally:
            if slot.actor is actor and slot.state.state == BUSY:
                slot.state.state = IDLE
                self._idle.put(slot)

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
                self._idle.put(slot)
                await self._watch(slot)
                reason = slot.reason
            except RayTaskError as error:  # its constructor raised, and would again
                cause = error.cause
                self._give_up(slot, cause if isinstance(cause, BrunoError) else WorkerError(_reason(error)))
                return
            except RayError as error:
                reason = _reason(error)
            self._idle.discard(slot)
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
            self._idle.fail(error)

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
