"""Where batches are handed in and finished ones are fetched, in one call, by a caller that may die at any moment.

A batch is run once, however often it is handed in, and its reply is handed out in every swap until the caller says
that it has arrived. So nothing has to be known about a caller that has died: its successor hands in again what may
not have arrived here, and is given again what may not have arrived there.
"""

import asyncio
from collections.abc import Awaitable, Callable

from bruno_ray.workers.messages import CallReply, Reply, Submission, Swap


class BatchQueue:
    """The batches of one study; all its methods run in one event loop."""

    def __init__(self, evaluate: Callable[[Submission], Awaitable[CallReply]]):
        self._evaluate = evaluate
        self._known: set[int] = set()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._finished: dict[int, CallReply | Exception] = {}  # and not known to have arrived

    async def swap(self, swap: Swap) -> list[Reply]:
        """Hand in batches, fetch all that have finished. If none has and ``block`` is set, wait for the first.

        It never waits when nothing runs.
        """
        for batch_id in swap.received:
            self._finished.pop(batch_id, None)
        for submission in swap.submit:
            if submission.batch_id not in self._known:
                self._known.add(submission.batch_id)
                self._running[submission.batch_id] = asyncio.create_task(self._run(submission))
        if swap.block and not self._finished and self._running:
            await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_COMPLETED)
        return list(self._finished.items())

    async def _run(self, submission: Submission) -> None:
        reply: CallReply | Exception
        try:
            reply = await self._evaluate(submission)
        except Exception as error:  # a reply as well: the lane knows what to make of it
            reply = error
        del self._running[submission.batch_id]
        self._finished[submission.batch_id] = reply
