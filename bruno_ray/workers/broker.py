"""The broker of the worker pool: a small asynchronous actor on the driver's machine.

It starts the workers, replaces those that die, and hands each call to the next idle worker; a call whose worker dies is
run again elsewhere, once. Everything that asks for work to be done (the study's lane, the pipeline) talks to the
broker, so workers may come and go. One worker's place:

                       a call             its actor is lost           too often without a call between
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError, TaskCancelledError

from bruno_ray.errors import BrunoError, WorkerError
from bruno_ray.workers.batch_queue import BatchQueue
from bruno_ray.workers.idle_queue import IdleQueue
from bruno_ray.workers.messages import CallReply, Reply, Submission, Swap
from bruno_ray.workers.worker_actor import BUSY, FAILED, IDLE, LOST, STARTING, WorkerActor, WorkerState

HEARTBEAT_S = 2.0
"""How often a worker is asked for its memory; also how soon the death of an idle worker is noticed."""


@dataclass
class Losses:
    """Workers that were lost in a row: by themselves, or with their machine.

    A process that dies again and again has no memory for the model or runs into a defect. A rented machine that its
    host takes back, or that cannot be reached for a minute, says nothing about the worker or its call.
    """

    crashes: int = 0
    machines: int = 0

    def add(self, error: RayError) -> None:
        if is_loss_of_machine(error):
            self.machines += 1
        else:
            self.crashes += 1

    def reach(self, bound: "Losses") -> bool:
        return self.crashes >= bound.crashes or self.machines >= bound.machines


OF_A_SLOT = Losses(crashes=3, machines=12)
"""A worker that is lost so often without finishing a call in between is not started again."""

OF_A_CALL = Losses(crashes=2, machines=6)
"""How many workers a call may lose before it counts as failed."""

STOPPED = "the run was stopped before this call came back: resume it to run the call again"

Submit = Callable[[Any], tuple[Any, Any]]
"""Starts a call on an actor; returns a reference that is ready when the call is over, and one to its result."""


class NoWorkerLeft(WorkerError):
    """Every worker has been given up: the call did not fail, there is nobody to run it."""


@dataclass(frozen=True)
class _WorkerDied:
    """How a call may end."""

    error: RayError


class Slot:
    """One place in the pool, filled by one actor after another."""

    def __init__(self, name: str):
        self.state = WorkerState(name)
        self.losses = Losses()
        self.actor: Any = None
        self.context = 0
        """Number of the context that the actor has been given."""
        self.lost = asyncio.Event()
        self.error: RayError | None = None
        """What a call said when it noticed that the worker is gone."""

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
        self._context, self._context_number = b"", 0
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

    async def set_context(self, context: bytes) -> None:
        """``context`` is cloudpickled. Each worker gets a copy of its own before its next call: an object that several
        share is pulled from any of them that has it, and workers need not reach each other (docs/cluster.md)."""
        self._context, self._context_number = context, self._context_number + 1

    async def run(self, method: str, arguments: bytes, with_context: bool = False) -> CallReply:
        """Call a method on the next idle worker; ``arguments`` is a cloudpickled tuple, opened in the worker.

        Raises WorkerError when the call has lost its worker twice or no worker is left.
        """
        return await self._call(lambda actor: actor.call.options(num_returns=2).remote(method, arguments, with_context))

    async def evaluate(self, batch: Submission) -> CallReply:
        """``evaluate(context, edits, rivals)`` on the next idle worker, as ``run`` does; NoWorkerLeft when there is
        none."""
        try:
            return await self._call(
                lambda actor: actor.evaluate.options(num_returns=2).remote(batch.edits, batch.rivals)
            )
        except BrunoError as error:
            if error is self._failure:
                raise NoWorkerLeft(f"no worker is left ({error}): fix the cause, then resume the run") from error
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
        lost: list[str] = []
        losses = Losses()
        while not losses.reach(OF_A_CALL):
            slot = await self._idle.get(urgent=bool(lost))
            slot.state.state = BUSY
            use = asyncio.create_task(self._use(slot, submit))
            self._in_use.add(use)
            use.add_done_callback(self._in_use.discard)
            end = await asyncio.shield(use)  # a call that is cancelled stops waiting; its worker is busy all the same
            if isinstance(end, CallReply):
                return end
            losses.add(end.error)
            lost.append(f"{slot.name} ({_reason(end.error)})")
        raise WorkerError(f"it lost {' and then '.join(lost)}: look at the memory and logs of the workers")

    async def _use(self, slot: Slot, submit: Submit) -> CallReply | _WorkerDied:
        """Run a call on the slot's worker. However it ends, the slot is then idle again or about to be filled anew."""
        actor = slot.actor
        try:
            await self._give_context(slot, actor)
            done, result = submit(actor)
            # The method raised, or the call was cancelled: the caller will see it when it gets the result.
            with suppress(RayTaskError, TaskCancelledError):
                await done
            slot.losses = Losses()
            slot.state.calls += 1
            return CallReply(slot.name, [result])
        except RayError as error:
            if slot.actor is actor:  # else the slot has been filled anew already
                slot.error = error
                slot.state.state = LOST
                slot.lost.set()
            return _WorkerDied(error)
        finally:
            if slot.actor is actor and slot.state.state == BUSY:
                slot.state.state = IDLE
                self._idle.put(slot)

    async def _give_context(self, slot: Slot, actor: Any) -> None:
        """Unless it has it. Where Ray cancels this together with the call that it is for, the next call gives it."""
        if slot.context == self._context_number:
            return
        number = self._context_number
        with suppress(TaskCancelledError):
            await actor.set_context.remote(self._context)
            if slot.actor is actor:  # else the slot has been filled anew already
                slot.context = number

    # ----- workers -----

    async def _keep(self, slot: Slot) -> None:
        """Keep a slot filled until the pool closes or the slot is given up."""
        while True:
            slot.lost.clear()
            slot.error = None
            slot.state.state = STARTING
            slot.context = 0
            slot.actor = WorkerActor.options(**self._options).remote()
            try:
                await slot.actor.start.remote(self._payload)
                slot.state.state = IDLE
                self._first.set()
                self._idle.put(slot)
                loss = await self._watch(slot)
            except RayTaskError as error:  # its constructor raised, and would again
                cause = error.cause
                self._give_up(slot, cause if isinstance(cause, BrunoError) else WorkerError(_reason(error)))
                return
            except RayError as error:
                loss = error
            self._idle.discard(slot)
            slot.state.state = LOST
            slot.state.losses += 1
            slot.losses.add(loss)
            ray.kill(slot.actor)  # it may be unreachable rather than dead
            if slot.losses.reach(OF_A_SLOT):
                times = slot.losses.crashes + slot.losses.machines
                self._give_up(slot, WorkerError(f"{slot.name} died {times} times in a row ({_reason(loss)})"))
                return
            self._say(f"{slot.name} is lost ({_reason(loss)}); starting another in its place")

    async def _watch(self, slot: Slot) -> RayError:
        """Return what a call noticed of the worker's loss. Raises RayError when this notices it first."""
        while slot.error is None:
            stat = await slot.actor.stat.remote()
            for name, value in stat.items():
                setattr(slot.state, name, value)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(slot.lost.wait(), HEARTBEAT_S)
        return slot.error

    def _give_up(self, slot: Slot, error: BrunoError) -> None:
        slot.state.state = FAILED
        self._say(f"{slot.name} is given up: {error}")
        if all(other.state.state == FAILED for other in self._slots):
            self._failure = error
            self._first.set()
            self._idle.fail(error)

    def _say(self, event: str) -> None:
        self._events.append(f"{time.strftime('%H:%M:%S')} {event}")


def is_loss_of_machine(error: RayError) -> bool:
    """Whether a worker was lost with its machine, or cannot be reached there: not by itself.

    Ray says "unavailable" as soon as the connection breaks, and "its node has died" once it has given the node up.
    """
    return isinstance(error, ActorUnavailableError) or "node has died" in str(error)


def _reason(error: BaseException) -> str:
    """What Ray says of a lost worker, without its list of common causes; of a raised error, its own text."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}"
    text = " ".join(str(error).split())
    for marker in ("Worker exit detail: ", "The actor died because "):
        text = text.split(marker)[-1]
    return text.split(" Some common causes")[0][:200].rstrip(". ") or type(error).__name__
