"""A server with little room, open to others: what it refuses, who gets in, what it leaves behind."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.serve.conftest import ORIGIN, TALKATIVE
from tests.serve.server import Server, events_of
from tests.support import tiny_models
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = {"model": TALKATIVE, "prompt": "tell me", "max_tokens": 30_000, "ignore_eos": True}
"""More than any machine writes in the time that a request has here."""


def test_where_others_can_connect_a_key_is_made_and_printed_once(small: Server) -> None:
    assert re.fullmatch(r"bruno-[\w-]{40,}", small.key)
    assert httpx.get(f"{small.url}/v1/models", timeout=60).status_code == 401
    assert httpx.get(f"{small.url}/health", timeout=60).status_code == 200
    assert small.get("/v1/models").status_code == 200
    assert small.logs().count(small.key) == 1


def test_without_pages_there_are_none(small: Server) -> None:
    for path in ("/chat/", "/study/four-bit/"):
        assert small.get(path).status_code == 404


def test_a_request_that_takes_too_long_is_a_408(small: Server) -> None:
    def streamed() -> str:
        with small.client() as client, client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as said:
            assert said.status_code == 200
            return said.read().decode()

    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(streamed)
        answer = small.post("/v1/completions", **LONG)
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "timeout"
    # In a stream that has begun, an event says it.
    assert '"code":"timeout"' in stream.result() and stream.result().endswith("data: [DONE]\n\n")


def test_more_than_there_is_room_for_is_a_429_that_says_when_to_come_back(small: Server) -> None:
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(small.post, "/v1/completions", **LONG) for _ in range(24)]
        answers = [entry.result() for entry in asked]
    assert {answer.status_code for answer in answers} == {408, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"


def test_only_named_pages_may_use_the_api_from_a_browser(small: Server) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://elsewhere.example.org", None)):
        headers = {"Origin": origin, **asks}
        preflight = httpx.options(f"{small.url}/v1/chat/completions", headers=headers, timeout=60)
        assert preflight.headers.get("access-control-allow-origin") == allowed
        assert preflight.status_code == (200 if allowed else 400)
        assert allowed or f"--cors-origin {origin}" in preflight.json()["error"]["message"]
        answer = httpx.get(f"{small.url}/v1/models", headers={"Origin": origin, **small.headers}, timeout=60)
        assert answer.headers.get("access-control-allow-origin") == allowed


def test_a_json_format_is_held_to(small: Server) -> None:
    """Base and edits, in one piece and streamed; a random model would say anything else."""
    pytest.importorskip("llguidance", reason="the extra [grammar] is not installed")
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    body = {"messages": [{"role": "user", "content": "Sure?"}], "response_format": form, "temperature": 1.5, "seed": 3}
    for model in (small.base, small.trials[0]):
        (choice,) = small.post("/v1/chat/completions", model=model, **body).json()["choices"]
        assert set(json.loads(choice["message"]["content"])) == {"sure"} and choice["finish_reason"] == "stop"
        *events, _ = events_of(small, "/v1/chat/completions", model=model, **body)
        pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(pieces) == choice["message"]["content"]


def test_a_tool_is_called_and_its_result_goes_back(small: Server) -> None:
    """A random model calls nothing by itself: the form of its answer is given, and spaces are forbidden, of which it
    would fill the context."""
    pytest.importorskip("llguidance", reason="the extra [grammar] is not installed")
    parameters = {"type": "object", "properties": {"zone": {"const": "UTC"}}, "required": ["zone"],
                  "additionalProperties": False}  # fmt: skip
    call = {"type": "object", "properties": {"name": {"const": "get_time"}, "parameters": parameters},
            "required": ["name", "parameters"], "additionalProperties": False}  # fmt: skip
    ask = [{"role": "user", "content": "What time is it?"}]
    tools = [{"type": "function", "function": {"name": "get_time", "parameters": parameters}}]
    form = {"type": "json_schema", "json_schema": {"name": "call", "schema": call}}
    spaces = dict.fromkeys(map(str, tiny_models.build_tokenizer()("\n ")["input_ids"]), -100)
    body = {"model": small.trials[0], "tools": tools, "response_format": form, "seed": 1, "logit_bias": spaces}
    (choice,) = small.post("/v1/chat/completions", messages=ask, **body).json()["choices"]
    (called,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert called["function"]["name"] == "get_time" and json.loads(called["function"]["arguments"]) == {"zone": "UTC"}

    chunks = [json.loads(event)["choices"][0] for event in
              events_of(small, "/v1/chat/completions", messages=ask, **body)[:-1]]  # fmt: skip
    (streamed,) = [chunk["delta"]["tool_calls"] for chunk in chunks if "tool_calls" in chunk["delta"]]
    assert [call["function"] for call in streamed] == [called["function"]] and streamed[0]["index"] == 0
    assert chunks[-1]["finish_reason"] == "tool_calls"
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == ""

    turns = [*ask, choice["message"], {"role": "tool", "tool_call_id": called["id"], "content": "noon"}]
    answer = small.post("/v1/chat/completions", model=small.trials[0], messages=turns, tools=tools, max_tokens=2)
    assert answer.status_code == 200, answer.text
    plain = small.post("/v1/chat/completions", messages=ask, **{**body, "tool_choice": "none"}).json()["choices"][0]
    assert json.loads(plain["message"]["content"])["name"] == "get_time" and plain["finish_reason"] == "stop"


def test_ctrl_c_leaves_nothing_behind(small: Server) -> None:
    """The last one: nobody has this server after it."""
    assert len(processes_of(small)) > 3
    assert small.stop() == 0
    # Ray's workers and agents end by themselves, after their raylet.
    wait_for(lambda: not processes_of(small), "every process has ended", detail=lambda: processes_of(small))
    assert "Traceback" not in small.output.read_text()


def processes_of(server: Server) -> list[str]:
    """Command lines of everything that was started for a server and is still there."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        environ = process.info["environ"] or {}
        if process.info["status"] != psutil.STATUS_ZOMBIE and environ.get("RAY_TMPDIR") == str(server.ray):
            found.append(" ".join(process.info["cmdline"] or []))
    return found
