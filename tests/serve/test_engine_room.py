"""The engine when room is short or much is asked: nobody waits for ever, nothing is lost, who has gone leaves."""

import asyncio
import random
import threading
import time

import pytest
import torch

from serve.engine.engine import Event, GenerationRequest
from serve.errors import EngineError, InvalidRequest, Overloaded, TooLong
from tests.support import tiny_models
from tests.support.engine_helpers import (
    HYBRIDS,
    answers,
    check_texts,
    collect,
    engine_of,
    load,
    prompt,
    request,
    run,
    together,
    writer_in,
)
from tests.support.waiting import wait_for

# ----- room -----


@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_go_back_when_room_is_short_and_still_get_their_answer(family: str) -> None:
    loaded = load(family)
    asked = [request(prompt(4 + i, seed=i), str(i) if i else None, 110, ignore_eos=True) for i in range(5)]
    with engine_of(loaded, kv_tokens=420) as engine:
        found = together(engine, asked)
        stats = engine.stats()
    check_texts(loaded, asked, found)
    assert stats.preemptions > 0, "there was room for all: the test shows nothing"
    assert stats.kv_tokens == 420 and stats.running == stats.waiting == stats.kv_tokens_used == 0


def test_the_buffers_stay_within_the_limit() -> None:
    loaded = load()
    limit, largest = 600, 0
    with engine_of(loaded, kv_tokens=limit, max_rows=6) as engine:
        cache = engine._steps._batch.cache

        async def work() -> None:
            nonlocal largest
            tasks = [
                asyncio.ensure_future(collect(engine, request(prompt(1 + 7 * i, seed=i), None, 90 - 5 * i)))
                for i in range(12)
            ]
            while not all(task.done() for task in tasks):
                largest = max(largest, cache._capacity[0] * cache._capacity[1])
                await asyncio.sleep(0.001)

        run(work)
    assert 0 < largest <= limit


@pytest.mark.parametrize("place", ["decode", "prefill"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_out_of_memory_changes_no_text(family: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third pass of one kind fails in the middle of the model; some layers have seen the token by then."""
    loaded = load(family)
    asked = [request(prompt(5 + 3 * i, seed=i), str(i) if i else None, 14, ignore_eos=True) for i in range(6)]
    passes = 0

    def fail(module: object, args: tuple) -> None:
        nonlocal passes
        length = args[0].shape[1]
        if (length == 1) == (place == "decode"):
            passes += 1
            if passes == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with engine_of(loaded, prefill_tokens=16) as engine:
        writer_in(loaded, 1).register_forward_pre_hook(fail)
        found = together(engine, asked)
        stats = engine.stats()
    check_texts(loaded, asked, found)
    assert passes > 3 and stats.preemptions > 0 and stats.failed_steps == 0


def test_a_request_that_never_fits_ends_with_an_error_and_the_others_go_on() -> None:
    loaded = load()

    def fail(module: object, args: tuple) -> None:
        if args[0].shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with engine_of(loaded) as engine:
        writer_in(loaded, 1).register_forward_pre_hook(fail)
        small = [request(prompt(4, seed=i), str(i), 8) for i in range(3)]
        found = answers(engine, [*small, request(prompt(200))])
        check_texts(loaded, small, found[:3])
        check_texts(loaded, small, answers(engine, small))
    assert found[3].finish_reason == "error" and "not enough memory" in found[3].error


@pytest.mark.parametrize("place", ["decode", "prefill"])
def test_a_failed_step_ends_its_rows_and_the_engine_goes_on(place: str) -> None:
    loaded = load()
    armed = True

    def fail(module: object, args: tuple) -> None:
        length = args[0].shape[1]
        if armed and (length == 1) == (place == "decode"):
            raise RuntimeError("kernel launch failed")

    asked = [request(prompt(5, seed=i), str(i), 6) for i in range(3)]
    with engine_of(loaded) as engine:
        writer_in(loaded, 0).register_forward_pre_hook(fail)
        found = answers(engine, asked)
        assert engine.stats().failed_steps > 0
        armed = False
        check_texts(loaded, asked, answers(engine, asked))
        assert engine.stats().failed_steps == 0
    assert all(event.finish_reason == "error" and "kernel launch failed" in event.error for event in found)


def test_a_loop_that_breaks_says_so_and_lets_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no step survives: whoever waits is told, and nobody is let in any more."""
    loaded = load()
    with engine_of(loaded) as engine:
        monkeypatch.setattr(engine._steps, "take_new", lambda: 1 / 0)
        (event,) = answers(engine, [request(prompt(5))])
        assert event.finish_reason == "error" and "has stopped" in event.error
        with pytest.raises(EngineError, match="start the server again"):
            answers(engine, [request(prompt(5))])
        assert engine.stats().failed_steps > 100


# ----- who is let in, who leaves -----


def test_what_is_refused_before_it_is_queued() -> None:
    loaded = load()
    with engine_of(loaded, max_context=30) as engine:
        assert engine.max_context == 30
        for asked, error, words in (
            (request(prompt(30)), TooLong, "30 tokens.*may have 30"),
            (request([]), InvalidRequest, "empty"),
            (request([3, tiny_models.VOCAB_SIZE]), InvalidRequest, "token id"),
            (request([3, -1]), InvalidRequest, "token id"),
            (request([3], "nobody"), InvalidRequest, "no edit 'nobody'"),
            (request([3], n_tokens=0), InvalidRequest, "max_tokens"),
        ):
            with pytest.raises(error, match=words):
                answers(engine, [asked])
        with pytest.raises(InvalidRequest, match="no edit"):
            run(lambda: engine.next_logprobs([[1]], ["nobody"]))
        with pytest.raises(TooLong):
            run(lambda: engine.next_logprobs([prompt(31)], [None]))
        assert answers(engine, [request(prompt(29))])[0].n_completion == 1
        assert engine.stats().steps < 20
    with pytest.raises(EngineError, match="shut down"):
        answers(engine, [request(prompt(3))])


def test_a_full_queue_is_overloaded_and_everyone_let_in_is_answered() -> None:
    loaded = load()
    with engine_of(loaded, max_rows=2, max_waiting=3) as engine:

        async def work() -> list[Event | BaseException]:
            asked = [request(prompt(4, seed=i), None, 30, ignore_eos=True) for i in range(9)]
            with engine._changed:  # all have asked before the first step
                tasks = [asyncio.ensure_future(collect(engine, one)) for one in asked]
                await asyncio.sleep(0)
            return await asyncio.gather(*tasks, return_exceptions=True)

        found = run(work)
        assert answers(engine, [request(prompt(4))])[0].finish_reason is not None
    refused = [one for one in found if isinstance(one, Overloaded)]
    served = [one for one in found if isinstance(one, Event)]
    assert len(refused) == 4 and len(served) == 5
    assert all(one.n_completion == 30 for one in served)
    assert all(1 <= one.retry_after <= 30 for one in refused)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_row_that_nobody_wants_leaves_within_one_step(how: str) -> None:
    loaded = load()
    with engine_of(loaded) as engine:

        async def work() -> tuple[int, int]:
            asked = request(prompt(4), "1", 400, ignore_eos=True)
            if how == "close":
                stream = engine.generate(asked)
                await anext(stream)
                await stream.aclose()
            else:
                task = asyncio.ensure_future(collect(engine, asked))
                while not engine.stats().tokens:
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            before = engine.stats().steps
            while engine.stats().running:
                await asyncio.sleep(0.001)
            return before, engine.stats().steps

        before, after = run(work)
        assert after - before <= 2  # the step that was under way, and the one that took it out
        assert engine.stats().kv_tokens_used == 0 and engine.stats().tokens < 399
        check_texts(loaded, [request(prompt(5), "2")], answers(engine, [request(prompt(5), "2")]))


def test_cancelling_a_long_prompt_and_a_score_while_they_are_read() -> None:
    loaded = load()
    with engine_of(loaded, prefill_tokens=4) as engine:

        async def work() -> None:
            tasks = [
                asyncio.ensure_future(collect(engine, request(prompt(400)))),
                asyncio.ensure_future(engine.next_logprobs([prompt(50)] * 200, [None, "1"])),
            ]
            while engine.stats().steps < 3:
                await asyncio.sleep(0.001)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            before = engine.stats().steps
            while engine._steps.has_work():
                await asyncio.sleep(0.001)
            assert engine.stats().steps - before <= 2

        run(work)


def test_a_closed_event_loop_takes_its_rows_with_it() -> None:
    loaded = load()
    with engine_of(loaded) as engine:
        loop = asyncio.new_event_loop()
        stream = engine.generate(request(prompt(4), None, 450, ignore_eos=True))
        loop.run_until_complete(anext(stream))
        loop.close()
        wait_for(lambda: engine.stats().running == 0, "the rows have left", interval_s=0.005)
        assert engine.stats().tokens < 449


def test_an_idle_engine_does_nothing_and_closing_ends_what_runs() -> None:
    loaded = load()
    with engine_of(loaded) as engine:
        answers(engine, [request(prompt(4))])
        steps = engine.stats().steps
        time.sleep(0.2)
        assert engine.stats().steps <= steps + 1

        async def work() -> Event:
            task = asyncio.ensure_future(collect(engine, request(prompt(4), None, 450, ignore_eos=True)))
            while not engine.stats().running:
                await asyncio.sleep(0.001)
            await asyncio.get_running_loop().run_in_executor(None, engine.close)
            return await task

        event = run(work)
        assert event.finish_reason == "error" and "shut down" in event.error
        assert engine._thread not in threading.enumerate()
        engine._editor.close()


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    """A long prompt is read in pieces; answers that run and prompts that come later go on between them."""
    loaded = load()
    with engine_of(loaded, prefill_tokens=8) as engine:

        async def work() -> list[str]:
            done: list[str] = []

            async def one(name: str, asked: GenerationRequest) -> None:
                await collect(engine, asked)
                done.append(name)

            tasks = [asyncio.ensure_future(one("running", request(prompt(4), "1", 20, ignore_eos=True)))]
            while not engine.stats().tokens:
                await asyncio.sleep(0.001)
            with engine._changed:  # both are there, in this order, before the next step
                tasks.append(asyncio.ensure_future(one("long", request(prompt(480), None, 1))))
                tasks.append(asyncio.ensure_future(one("short", request(prompt(5), "2", 3, ignore_eos=True))))
                await asyncio.sleep(0)
            await asyncio.gather(*tasks)
            return done

        assert run(work)[-1] == "long"


def test_a_long_prompt_is_not_put_off_by_a_stream_of_short_ones() -> None:
    loaded = load()
    with engine_of(loaded, prefill_tokens=8) as engine:

        async def work() -> tuple[int, Event]:
            long = asyncio.ensure_future(collect(engine, request(prompt(160), None, 1)))
            n_short = 0

            async def stream() -> None:
                nonlocal n_short
                while not long.done():
                    await collect(engine, request(prompt(5, seed=n_short), None, 1))
                    n_short += 1

            await asyncio.wait([asyncio.ensure_future(stream()) for _ in range(6)], timeout=60)
            return n_short, await long

        n_short, event = run(work)
    assert event.finish_reason is not None and n_short > 3


def test_a_crowd_that_comes_and_goes() -> None:
    """120 requests of all kinds in little room, every fifth given up: the others are answered, nothing is left."""
    loaded = load()
    rng = random.Random(0)
    asked = [
        request(
            prompt(rng.choice([1, 5, 20, 60]), seed=i),
            rng.choice([None, *map(str, range(8))]),
            rng.choice([1, 4, 20, 60]),
            ignore_eos=rng.random() < 0.5,
            stop=("no such text",) if rng.random() < 0.3 else (),
            top_logprobs=rng.choice([None, None, 2]),
        )
        for i in range(120)
    ]
    with engine_of(loaded, kv_tokens=700, max_rows=12, prefill_tokens=48) as engine:

        async def one(i: int) -> Event | None:
            await asyncio.sleep(0.01 * (i % 40))
            if i % 5:
                return await collect(engine, asked[i])
            async for event in engine.generate(asked[i]):
                if event.n_completion >= 3:
                    return None
            return None

        async def work() -> list[Event | None]:
            return await asyncio.gather(*(one(i) for i in range(len(asked))))

        found = run(work)
        wait_for(lambda: not engine._steps.has_work(), "nothing is left over", interval_s=0.005)
        stats = engine.stats()
    served = [(one, event) for i, (one, event) in enumerate(zip(asked, found)) if i % 5]
    check_texts(loaded, [one for one, _ in served], [event for _, event in served])
    assert (stats.running, stats.waiting, stats.kv_tokens_used, stats.failed_steps) == (0, 0, 0, 0)
