"""Events of many answers in one message: each reaches the one it is for, in order, whatever ends first."""

import asyncio
import time
from dataclasses import fields

import pytest
from ray.serve.exceptions import RayServeException

from serve.deployment import engine_clients, event_channel
from serve.deployment.event_channel import Ended, EventChannel, EventReceiver, StreamId, pumped
from serve.deployment.replica import Refusal
from serve.engine.sampling import TokenLogprob
from serve.engine.types import Event, joined
from serve.errors import RequestError

SOON = 5.0


def events_from(*items, later=()) -> list[Event]:
    """What a reader gets of a queue that holds ``items``, and soon afterwards ``later``."""

    async def read() -> list[Event]:
        queue: asyncio.Queue = asyncio.Queue()
        for item in items:
            queue.put_nowait(item)

        async def more() -> None:
            await asyncio.sleep(0.05)
            for item in later:
                queue.put_nowait(item)

        task = asyncio.create_task(more())
        try:
            return [event async for event in engine_clients._from(queue, time.monotonic() + SOON)]
        finally:
            await task

    return asyncio.run(read())


def test_events_are_joined_into_one_with_the_last_ones_totals():
    """Every field of Event: one that is forgotten would be lost on the way to the client."""
    first = Event("a", (1,), (TokenLogprob(1, -1.0),), (TokenLogprob(9, None),), None, None, 3, 1)
    last = Event("b", (2, 3), (TokenLogprob(2, -2.0),), (), "stop", "an error", 3, 3)
    whole = joined([first, Event(n_prompt=3, n_completion=1), last])
    expected = {
        "text": "ab",
        "token_ids": (1, 2, 3),
        "logprobs": (TokenLogprob(1, -1.0), TokenLogprob(2, -2.0)),
        "prompt_logprobs": (TokenLogprob(9, None),),
        "finish_reason": "stop",
        "error": "an error",
        "n_prompt": 3,
        "n_completion": 3,
    }
    assert {field.name: getattr(whole, field.name) for field in fields(Event)} == expected
    assert joined([first]) == first


def test_what_has_come_meanwhile_is_one_event():
    found = events_from(
        Event("a", n_completion=1), Event("b", n_completion=2), later=[Event("c", finish_reason="stop")]
    )
    assert [(event.text, event.finish_reason) for event in found] == [("ab", None), ("c", "stop")]


def test_an_answer_whose_own_call_ends_first_is_still_read_to_its_end():
    found = events_from(Event("a"), Ended(), later=[Event("b"), Event("c", finish_reason="length")])
    assert "".join(event.text for event in found) == "abc"
    assert found[-1].finish_reason == "length"


def test_an_answer_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(engine_clients, "STRAGGLERS_SECONDS", 0.05)
    found = events_from(Event("a"), Ended())
    assert [event.text for event in found] == ["a"]
    assert found[-1].finish_reason is None


@pytest.mark.parametrize(
    ("problem", "kind"), [(Refusal(400, "no"), RequestError), (RuntimeError("died"), RuntimeError)]
)
def test_what_goes_wrong_is_raised_after_what_came_before(problem, kind):
    async def read() -> list[str]:
        queue: asyncio.Queue = asyncio.Queue()
        texts = []
        for item in (Event("a"), problem):
            queue.put_nowait(item)
        with pytest.raises(kind):
            async for event in engine_clients._from(queue, time.monotonic() + SOON):
                texts.append(event.text)
        return texts

    assert asyncio.run(read()) == ["a"]


def test_a_request_that_takes_too_long_is_given_up():
    async def read() -> None:
        async for _ in engine_clients._from(asyncio.Queue(), time.monotonic() + 0.05):
            pass

    with pytest.raises((asyncio.TimeoutError, TimeoutError)):
        asyncio.run(read())


def test_a_channel_takes_all_that_waits_at_once():
    async def send() -> tuple[list, list]:
        channel = EventChannel()
        for i in range(3):
            channel.put(StreamId("api", i), Event(str(i)))
        first = await channel.batch()
        waiting = asyncio.create_task(channel.batch())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        channel.put(StreamId("api", 7), Event("x"))
        return first, await waiting

    first, second = asyncio.run(send())
    assert [(number, event.text) for number, event in first] == [(0, "0"), (1, "1"), (2, "2")]
    assert [number for number, _ in second] == [7]


def test_the_end_of_an_answers_own_call_is_passed_on_as_it_was():
    async def ends(error: Exception | None) -> list:
        async def stream():
            yield Event("a")
            if error is not None:
                raise error

        queue: asyncio.Queue = asyncio.Queue()
        with pumped(stream(), queue):
            return [await queue.get(), await queue.get()]

    assert isinstance(asyncio.run(ends(None))[1], Ended)
    assert isinstance(asyncio.run(ends(ValueError("x")))[1], ValueError)


def test_a_channel_that_fails_is_told_of_and_opened_again(monkeypatch, caplog):
    """Whatever it fails with: without channels no later answer gets its events."""
    monkeypatch.setattr(event_channel, "RECONNECT_SECONDS", 0.01)
    problems = [KeyError("a fault of ours"), RayServeException("the replica is gone")]

    class Handle:
        open_channel = property(lambda self: self)

        def options(self, stream: bool) -> "Handle":
            return self

        async def remote(self, name: str):
            if problems:
                raise problems.pop(0)
            yield [(0, "hello")]
            await asyncio.sleep(60)

    async def read() -> str:
        with EventReceiver({"m": Handle()}, 1).stream("m") as (_, queue):
            return await asyncio.wait_for(queue.get(), 30)

    assert asyncio.run(read()) == "hello"
    assert "a fault of ours" in caplog.text
