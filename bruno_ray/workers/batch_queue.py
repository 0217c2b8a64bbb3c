"""Where lanes hand in batches and take away what has finished, whichever lane brought it in.

A few lanes thus serve any number of workers. A reply that a lane takes away is kept until the same lane comes again,
which it does only when the driver has what it carried. When a lane is lost, the driver hands in again what that lane
had along: a ticket that is known is not run again, and replies that were on their way are given out once more.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Reply = tuple[int, Any]
"""The batch's ticket, and what evaluating it has returned, or the exception that it has raised."""


class Exchange:
    """Belongs to one study; all its methods run in one event loop."""

    def __init__(self, evaluate: Callable[[Any], Awaitable[Any]]):
        self._evaluate = evaluate
        self._known: set[int] = set()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._finished: list[Reply] = []
        self._carried: dict[str, list[Reply]] = {}  # by lane: what it took away the last time
        self._losses = 0
        self._moved = asyncio.Condition()

    async def trip(self, lane: str, batches: Sequence[tuple[int, Any]], wait: bool, again: bool) -> list[Reply]:
        """Hand in (ticket, batch) pairs, take away all that has finished; the first that finishes if nothing has yet.

        Args:
            lane: names the caller.
            wait: else it returns at once, with nothing if nothing has finished. It never waits when nothing runs.
            again: a lane was lost, and with it perhaps replies.
        """
        self._carried.pop(lane, None)
        if again:
            self._losses += 1  # also ends the waiting of a lost lane, which would take replies to nowhere
            self._finished += [reply for replies in self._carried.values() for reply in replies]
            self._carried.clear()
        for ticket, batch in batches:
            if ticket not in self._known:
                self._known.add(ticket)
                self._running[ticket] = asyncio.create_task(self._run(ticket, batch))
        losses = self._losses
        async with self._moved:
            self._moved.notify_all()
            if wait:
                await self._moved.wait_for(lambda: self._finished or not self._running or self._losses != losses)
            if self._losses != losses:
                return []
            replies, self._finished = self._finished, []
        self._carried[lane] = replies
        return replies

    async def _run(self, ticket: int, batch: Any) -> None:
        try:
            reply = await self._evaluate(batch)
        except Exception as error:  # a reply as well: the lane knows what to make of it
            reply = error
        async with self._moved:
            del self._running[ticket]
            self._finished.append((ticket, reply))
            self._moved.notify_all()
