"""What lanes hand in comes back once, by whichever lane, and also when one of them is lost."""

import asyncio

from bruno_ray.workers.batch_queue import Exchange


class Pool:
    """Evaluates when it is told to."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.results: dict[str, asyncio.Future] = {}

    async def evaluate(self, batch: str) -> str:
        self.begun.append(batch)
        return await self.results.setdefault(batch, asyncio.get_running_loop().create_future())


def trip(exchange, lane, batches=(), wait=True, again=False) -> asyncio.Task:
    return asyncio.ensure_future(exchange.trip(lane, list(batches), wait, again))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(test) -> None:
    async def main() -> None:
        pool = Pool()
        await asyncio.wait_for(test(pool, Exchange(pool.evaluate)), 60)

    asyncio.run(main())


def test_any_lane_takes_what_has_finished():
    async def test(pool, exchange):
        first = trip(exchange, "a", [(0, "zero"), (1, "one"), (2, "two")])
        second = trip(exchange, "b")
        await settle()
        assert pool.begun == ["zero", "one", "two"] and not first.done() and not second.done()
        pool.results["two"].set_result("2")
        await settle()
        (one,), (other,) = await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
        assert one.result() == [(2, "2")]
        pool.results["zero"].set_exception(ValueError("no"))
        pool.results["one"].set_result("1")
        await settle()
        brought = other.result() + await trip(exchange, "c", wait=False)
        assert [ticket for ticket, _ in brought] == [0, 1] and isinstance(brought[0][1], ValueError)
        assert await trip(exchange, "b") == [], "nothing runs: nothing to wait for"

    run(test)


def test_a_trip_that_does_not_wait_takes_what_is_there():
    async def test(pool, exchange):
        assert await trip(exchange, "a", [(0, "zero")], wait=False) == []
        await settle()
        pool.results["zero"].set_result("0")
        await settle()
        assert await trip(exchange, "a", [(1, "one")], wait=False) == [(0, "0")]

    run(test)


def test_what_a_lost_lane_has_taken_or_waits_for_is_given_out_again_and_not_run_again():
    async def test(pool, exchange):
        lost = trip(exchange, "lost", [(0, "zero"), (1, "one")])
        await settle()
        pool.results["zero"].set_result("0")
        await settle()
        assert lost.result() == [(0, "0")]
        assert await trip(exchange, "again", [(0, "zero"), (1, "one"), (2, "two")], again=True) == [(0, "0")]
        await settle()
        assert pool.begun == ["zero", "one", "two"]
        ghost = trip(exchange, "again")
        await settle()
        live = trip(exchange, "new", again=True)
        pool.results["one"].set_result("1")
        await settle()
        assert ghost.result() == []
        assert (1, "1") in live.result()

    run(test)


def test_what_a_lane_has_brought_is_forgotten_when_it_comes_again():
    async def test(pool, exchange):
        bringing = trip(exchange, "a", [(0, "zero")])
        await settle()
        pool.results["zero"].set_result("0")
        assert await bringing == [(0, "0")]
        assert await trip(exchange, "a") == []
        assert await trip(exchange, "b", [(0, "zero")], again=True) == []
        assert pool.begun == ["zero"]

    run(test)
