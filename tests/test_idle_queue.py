"""Idle workers go to the calls that wait: urgent ones first, and none is lost to a call that was cancelled."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from bruno_ray.errors import WorkerError
from bruno_ray.workers.idle_queue import IdleQueue


def run(test: Callable[[IdleQueue[str]], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(IdleQueue()), 60)

    asyncio.run(main())


async def waiting(queue: IdleQueue[str], urgent: bool = False) -> "asyncio.Task[str]":
    task = asyncio.create_task(queue.get(urgent))
    await asyncio.sleep(0)
    assert not task.done()
    return task


def test_calls_get_workers_in_the_order_in_which_they_came() -> None:
    async def test(queue: IdleQueue[str]) -> None:
        queue.put("a")
        assert await queue.get() == "a"
        first, second = await waiting(queue), await waiting(queue)
        queue.put("b")
        queue.put("c")
        assert (await first, await second) == ("b", "c")

    run(test)


def test_a_call_that_has_lost_a_worker_goes_before_those_that_have_not() -> None:
    async def test(queue: IdleQueue[str]) -> None:
        patient = await waiting(queue)
        urgent = await waiting(queue, urgent=True)
        queue.put("a")
        assert await urgent == "a" and not patient.done()

    run(test)


@pytest.mark.parametrize("handed", [False, True])
def test_a_worker_is_not_lost_to_a_call_that_is_cancelled(handed: bool) -> None:
    """Cancelled while it waits, and cancelled in the moment in which it has got one."""

    async def test(queue: IdleQueue[str]) -> None:
        call = await waiting(queue)
        if handed:
            queue.put("a")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        if not handed:
            queue.put("a")
        assert await queue.get() == "a"

    run(test)


def test_a_worker_that_has_died_is_not_handed_out() -> None:
    async def test(queue: IdleQueue[str]) -> None:
        queue.put("dead")
        queue.put("alive")
        queue.discard("dead")
        queue.discard("never there")
        assert await queue.get() == "alive"

    run(test)


def test_when_there_are_no_workers_any_more_all_calls_say_so() -> None:
    async def test(queue: IdleQueue[str]) -> None:
        call = await waiting(queue)
        queue.fail(WorkerError("none is left"))
        for refused in (call, queue.get()):
            with pytest.raises(WorkerError, match="none is left"):
                await refused

    run(test)
