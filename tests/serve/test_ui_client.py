"""The page's client gets over ASGI what a client gets over HTTP, and what it no longer wants is cancelled."""

import asyncio
import json
from types import SimpleNamespace

import gradio as gr
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from serve.pages.chat.answers import RunningStreams, Sampling, answer
from serve.pages.chat.client import Api, ApiError
from serve.pages.chat.conversation import bubbles, caption, finished, messages, new_turn
from serve.pages.chat.page import Page


def event(**data) -> str:
    return f"data: {json.dumps(data)}\n\n"


def delta(text: str, finish: str | None = None) -> str:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


@pytest.fixture
def served() -> SimpleNamespace:
    """An application that answers as the API does; the prompt says how."""
    app, seen = FastAPI(), SimpleNamespace(requests=[], cancelled=0, running=0)

    @app.get("/v1/models")
    async def models(request: Request):
        if request.headers.get("authorization") != "Bearer good":
            return JSONResponse({"error": {"message": "no\nsuch key"}}, 401)
        return {"data": [], "query": request.url.query}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        seen.requests.append(body)
        prompt = body["messages"][-1]["content"]
        if prompt == "refuse":
            return JSONResponse({"error": {"message": "full: wait 2 s"}}, 429)
        if prompt == "break":
            raise RuntimeError("a defect")

        async def events():
            seen.running += 1
            try:
                yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
                # One event in two parts of the body, and two in one.
                whole = delta("one ") + delta("\u00e9wo ")
                yield whole[:30]
                yield whole[30:]
                if prompt == "end badly":
                    yield event(error={"message": "the replica died"})
                    return
                if prompt == "end early":
                    return
                while prompt == "endless":
                    await asyncio.sleep(0.01)
                    yield delta("more ")
                yield delta("", "length")
                yield event(choices=[], usage={"completion_tokens": 2})
                yield "data: [DONE]\n\n"
            except asyncio.CancelledError:
                seen.cancelled += 1
                raise
            finally:
                seen.running -= 1

        return StreamingResponse(events(), media_type="text/event-stream")

    return SimpleNamespace(api=Api(app), seen=seen)


def request(prompt: str) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": prompt}]}


async def text_of(stream) -> list[str]:
    return [piece async for piece in stream]


def test_get_hands_on_key_and_query(served):
    assert asyncio.run(served.api.get("/v1/models", "good", "a=b%20c")) == {"data": [], "query": "a=b%20c"}
    with pytest.raises(ApiError, match=r"^no such key \(401\)$"):
        asyncio.run(served.api.get("/v1/models", "bad"))
    with pytest.raises(ApiError, match="404"):
        asyncio.run(served.api.get("/nothing", ""))


def test_stream_gives_pieces_finish_and_usage(served):
    stream = served.api.chat(request("hello"), "")
    assert asyncio.run(text_of(stream)) == ["one ", "\u00e9wo "]
    assert (stream.finish_reason, stream.usage) == ("length", {"completion_tokens": 2})
    assert served.seen.requests == [{**request("hello"), "stream": True, "stream_options": {"include_usage": True}}]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("refuse", r"^full: wait 2 s \(429\)$"),
        ("break", r"\(500\)$"),
        ("end badly", "^the replica died$"),
        ("end early", "half-way"),
    ],
)
def test_what_goes_wrong_is_one_line(served, prompt, message):
    with pytest.raises(ApiError, match=message) as error:
        asyncio.run(text_of(served.api.chat(request(prompt), "")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["stop", "close"])
def test_an_answer_no_longer_wanted_is_cancelled(served, how):
    async def run() -> str | None:
        stream = served.api.chat(request("endless"), "")
        pieces = aiter(stream)
        while await anext(pieces) != "more ":
            pass
        assert served.seen.running == 1
        if how == "stop":
            stream.stop()
            assert [piece async for piece in pieces] == []
        else:
            await pieces.aclose()
        assert served.seen.running == 0
        return stream.finish_reason

    assert asyncio.run(run()) == ("stopped" if how == "stop" else None)
    assert served.seen.cancelled == 1


def test_stop_ends_the_answers_of_one_session_only(served):
    async def run():
        streams = RunningStreams()
        ended, written = [], {}

        async def one(session: str):
            async for turns in answer(served.api, streams, session, "", [new_turn("endless", "m")], Sampling()):
                last = written[id(turns[-1])] = turns[-1]
            ended.append((session, last["finish"], last["answer"].startswith("one \u00e9wo more")))

        tasks = [asyncio.create_task(one(session)) for session in ("a", "a", "b")]
        while sum("more" in turn["answer"] for turn in written.values()) < 3:
            await asyncio.sleep(0.01)
        streams.stop("a")
        await asyncio.wait(tasks[:2], timeout=60)
        assert ended == [("a", "stopped", True)] * 2
        assert not streams.any("a") and streams.any("b")
        assert served.seen.running == 1
        streams.stop("b")
        await tasks[2]

    asyncio.run(run())


def test_a_prompt_is_turned_away_while_answers_are_written(served):
    page, request_of_tab = Page(served.api, auth_required=False), SimpleNamespace(session_hash="a")

    def ask(prompt: str) -> list:
        return asyncio.run(page._ask(prompt, "m", "n", [], [], request_of_tab))

    with page.streams.holding("a", served.api.chat(request("endless"), "")):
        with pytest.raises(gr.Error, match="still being written"):
            ask("and more")
    with pytest.raises(gr.Error, match="Write a prompt"):
        ask(" ")
    box, _, _, left, _, _, right = ask("and more")
    assert box == "" and [turns[0]["model"] for turns in (left, right)] == ["m", "n"]


def test_turns_that_failed_are_shown_but_not_sent():
    good = {**new_turn("first", "m"), "answer": "yes", "finish": "stop"}
    failed = {**new_turn("second", "m"), "error": "full: wait 2 s"}
    turns = [good, failed, new_turn("third", "m")]
    assert messages(turns, " ") == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "third"},
    ]
    assert messages(turns[:1], "be brief")[0] == {"role": "system", "content": "be brief"}
    assert [bubble["content"] for bubble in bubbles(turns)] == [
        *("first", "yes"),
        *("second", "Error: full: wait 2 s"),
        "third",
    ]
    assert finished(turns) == [good, failed]  # the third's answer was never written
    assert "failed" in caption([failed])


def test_the_request_holds_what_was_set():
    turns = [new_turn("hi", "base:trial-3")]
    sampling = Sampling(temperature=0.0, top_p=0.5, max_tokens=7)
    body = sampling.request(turns)
    assert body["model"] == "base:trial-3"
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.0, 0.5, 7)
    assert "seed" not in body
    assert Sampling(seed=0).request(turns)["seed"] == 0
