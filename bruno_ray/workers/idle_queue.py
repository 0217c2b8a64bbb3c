"""Idle workers, and the calls that wait for one: urgent ones first, then in the order in which they came."""

import asyncio
import heapq
import itertools
from collections import deque
from typing import Generic, TypeVar

Worker = TypeVar("Worker")


class IdleQueue(Generic[Worker]):
    """All its methods run in one event loop. A worker that was handed to a call that is cancelled is idle again."""

    def __init__(self) -> None:
        self._idle: deque[Worker] = deque()
        self._waiting: list[tuple[bool, int, asyncio.Future[Worker]]] = []  # a heap; False sorts first
        self._arrivals = itertools.count()
        self._error: Exception | None = None

    def put(self, worker: Worker) -> None:
        """This worker can take a call."""
        self._idle.append(worker)
        self._match()

    def discard(self, worker: Worker) -> None:
        """This worker cannot take calls any more, if it could."""
        if worker in self._idle:
            self._idle.remove(worker)

    async def get(self, urgent: bool = False) -> Worker:
        """The next idle worker, for the caller alone until it is ``put`` back. Raises what ``fail`` was given."""
        if self._error is not None:
            raise self._error
        future: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (not urgent, next(self._arrivals), future))
        self._match()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.put(future.result())
            raise

    def fail(self, error: Exception) -> None:
        """From now on there are no workers: calls that wait raise this, and so do later ones."""
        self._error = error
        while self._waiting:
            *_, future = heapq.heappop(self._waiting)
            if not future.done():
                future.set_exception(error)

    def _match(self) -> None:
        while self._idle and self._waiting:
            *_, future = heapq.heappop(self._waiting)
            if not future.done():  # else its caller was cancelled
                future.set_result(self._idle.popleft())
