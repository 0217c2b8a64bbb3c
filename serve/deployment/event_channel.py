"""Events of many answers from a replica to an API process, together in one message per step.

A message between processes costs about a millisecond, whatever is in it. So an API process keeps one call open to a
replica, an event channel, and what happens to all of its streams goes through that. The call of a single answer stays
open meanwhile: closing it is how the answer is cancelled, and its failure is how the death of the replica is noticed.
Where there is no channel (yet), an answer's events come through its own call.
"""

import asyncio
import contextvars
import itertools
import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.5
STRAGGLERS_SECONDS = 5.0
"""Events that were sent through the channel before the answer's own call ended are here by then."""


@dataclass(frozen=True)
class StreamId:
    """Where the events of one answer are to go."""

    api: str
    """Name of the API process."""

    number: int
    """Of the answer, in that process."""


class EventChannel:
    """The replica's end of the channel to one API process."""

    def __init__(self) -> None:
        self._batch: list[tuple[int, Any]] = []
        self._ready = asyncio.Event()
        self._urgent = asyncio.Event()
        self.closed = False

    def put(self, stream: StreamId, event: Any, urgent: bool = False) -> None:
        self._batch.append((stream.number, event))
        self._ready.set()
        if urgent:
            self._urgent.set()

    async def pause(self, seconds: float) -> None:
        """Let events gather for a while; not beyond one that is urgent."""
        if seconds > 0:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), seconds)
        self._urgent.clear()

    async def batch(self) -> list[tuple[int, Any]]:
        """Everything since the last call; at least one event."""
        await self._ready.wait()
        self._ready.clear()
        batch, self._batch = self._batch, []
        return batch


class Ended:
    """The answer's own call is over; what it had to say has been sent."""


class EventReceiver:
    """The API's end of all its channels: opens them, and hands what comes to whom it is for."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], n_channels: int) -> None:
        """``n_channels`` per engine: Serve chooses the replica of each."""
        self._open = {key: handle.open_channel.options(stream=True) for key, handle in handles.items()}
        self._n_channels = n_channels
        self._name = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._queues: dict[int, asyncio.Queue] = {}
        self._tasks: dict[str, list[asyncio.Task]] = {}

    @contextmanager
    def stream(self, engine: str | None) -> Iterator[tuple[StreamId | None, asyncio.Queue]]:
        """The id of a new stream from an engine, and the queue that its events come to. No engine: only a queue."""
        if engine is None:
            yield None, asyncio.Queue()
            return
        if engine not in self._tasks:
            # In a context of its own: Serve cancels what belongs to a request when that is cancelled.
            start = contextvars.Context().run
            self._tasks[engine] = [start(asyncio.create_task, self._receive(engine)) for _ in range(self._n_channels)]
        number, queue = next(self._numbers), asyncio.Queue()
        self._queues[number] = queue
        try:
            yield StreamId(self._name, number), queue
        finally:
            del self._queues[number]

    async def _receive(self, engine: str) -> None:
        while True:
            try:
                async for batch in self._open[engine].remote(self._name):
                    for number, event in batch:
                        if (queue := self._queues.get(number)) is not None:
                            queue.put_nowait(event)
            except (RayError, RayServeException) as error:
                logger.info("a channel of %s ended: %s", engine, " ".join(str(error).split())[:200])
            except Exception:  # a fault of ours must not leave every later answer without its events
                logger.exception("a channel of %s failed and is opened again", engine)
            await asyncio.sleep(RECONNECT_SECONDS)


@contextmanager
def pumped(stream: AsyncIterator[Any], queue: asyncio.Queue) -> Iterator[None]:
    """Put what ``stream`` gives into ``queue`` as well, and then how it ended: an exception, or Ended."""

    async def pump() -> None:
        try:
            async for item in stream:
                queue.put_nowait(item)
            queue.put_nowait(Ended())
        except Exception as error:  # raised again where the queue is read
            queue.put_nowait(error)

    task = asyncio.create_task(pump())
    try:
        yield
    finally:
        task.cancel()


def everything_in(queue: asyncio.Queue, first: Any) -> list[Any]:
    """``first`` and what else has come meanwhile."""
    items = [first]
    while not queue.empty():
        items.append(queue.get_nowait())
    return items
