"""What is handed in is evaluated once, and its reply is handed out until it has arrived, whoever dies on the way."""

import asyncio
from collections.abc import Awaitable, Callable

from bruno_ray.ablation.edit import Edit
from bruno_ray.workers.batch_queue import BatchQueue
from bruno_ray.workers.messages import CallReply, Reply, Submission, Swap


def batch(batch_id: int) -> Submission:
    return Submission(batch_id, (Edit({}, str(batch_id), None, "none"),))


class Pool:
    """Evaluates when it is told to."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self._replies: dict[int, asyncio.Future[CallReply]] = {}

    async def evaluate(self, submission: Submission) -> CallReply:
        batch_id = submission.batch_id
        self.begun.append(batch_id)
        return await self._replies.setdefault(batch_id, asyncio.get_running_loop().create_future())

    async def finish(self, batch_id: int, error: Exception | None = None) -> None:
        if error is None:
            self._replies[batch_id].set_result(CallReply("worker 0", [batch_id]))
        else:
            self._replies[batch_id].set_exception(error)
        await settle()


class Caller:
    """Calls swap as the driver does, through a lane that may be lost."""

    def __init__(self, queue: BatchQueue):
        self.queue = queue
        self.received: tuple[int, ...] = ()

    def start(self, *submit: int, block: bool = True) -> "asyncio.Task[list[Reply]]":
        return asyncio.ensure_future(self.queue.swap(Swap(tuple(map(batch, submit)), self.received, block)))

    def arrived(self, swap: "asyncio.Task[list[Reply]]") -> list[int]:
        """Ids of what a swap that was not lost has brought."""
        self.received = tuple(batch_id for batch_id, _ in swap.result())
        return list(self.received)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(test: Callable[[Pool, Caller], Awaitable[None]]) -> None:
    async def main() -> None:
        pool = Pool()
        await asyncio.wait_for(test(pool, Caller(BatchQueue(pool.evaluate))), 60)

    asyncio.run(main())


def test_a_swap_waits_for_the_first_batch_and_brings_all_that_have_finished() -> None:
    async def test(pool: Pool, caller: Caller) -> None:
        swap = caller.start(0, 1, 2)
        await settle()
        assert pool.begun == [0, 1, 2] and not swap.done()
        await pool.finish(2)
        assert caller.arrived(swap) == [2]
        await pool.finish(0, ValueError("no"))
        await pool.finish(1)
        swap = caller.start()
        await settle()
        assert caller.arrived(swap) == [0, 1], "in the order in which they have finished"
        assert isinstance(dict(swap.result())[0], ValueError)

    run(test)


def test_a_swap_does_not_wait_when_it_is_not_to_or_when_nothing_runs() -> None:
    async def test(pool: Pool, caller: Caller) -> None:
        assert await caller.start(0, block=False) == []
        await settle()
        await pool.finish(0)
        swap = caller.start(1, block=False)
        await settle()
        assert caller.arrived(swap) == [0]
        await pool.finish(1)
        swap = caller.start()
        await settle()
        assert caller.arrived(swap) == [1]
        assert await caller.start() == []

    run(test)


def test_a_reply_is_handed_out_until_it_has_arrived() -> None:
    async def test(pool: Pool, caller: Caller) -> None:
        lost = caller.start(0, 1)
        await settle()
        await pool.finish(0)
        assert [batch_id for batch_id, _ in lost.result()] == [0], "which never reaches the driver"
        swap = caller.start(0, 1, 2)
        await settle()
        assert caller.arrived(swap) == [0]
        assert pool.begun == [0, 1, 2], "each once"
        swap = caller.start()
        await settle()
        assert not swap.done(), "what has arrived does not come again"

    run(test)


def test_a_swap_that_nobody_waits_for_any_more_takes_nothing_away() -> None:
    """A lane was killed while it waited here; its successor waits as well."""

    async def test(pool: Pool, caller: Caller) -> None:
        caller.start(0)
        await settle()
        live = caller.start(0)
        await settle()
        await pool.finish(0)
        assert caller.arrived(live) == [0]
        assert pool.begun == [0]

    run(test)


def test_what_has_arrived_is_not_evaluated_when_it_is_handed_in_again() -> None:
    async def test(pool: Pool, caller: Caller) -> None:
        swap = caller.start(0)
        await settle()
        await pool.finish(0)
        assert caller.arrived(swap) == [0]
        assert await caller.start(0) == []
        assert pool.begun == [0]

    run(test)
