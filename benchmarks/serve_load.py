"""A rough day for the server, in minutes: many readers, some of whom go away or talk nonsense, and a replica that dies.

    python -m benchmarks.serve_load [--requests 2000] [--connections 64] [--rounds 3]

Two copies of the organism serve its base and trials. In every round a tenth of the requests are cancelled by their
client, a twentieth are malformed, and one copy is killed when half of them have been answered. Every request that is
not cancelled must come to exactly one end: the whole answer (greedy ones: the same text as when asked alone), or an
error in the API's own form. What it says about memory is the private memory (USS) after each round, once both copies
are back. The table goes to ``RESULTS.md``; ``tests/serve/test_load.py`` asserts the same of a shorter run.
"""

import argparse
import asyncio
import json
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.results import write_section
from benchmarks.serve_parts import end_in_order, private_bytes
from serve.deployment.engine_clients import STATS_KEPT
from tests.serve.server import Server, make_run, serving

logger = logging.getLogger(__name__)

CANCELLED, MALFORMED = 0.10, 0.05
WORDS = ("tell me about the river", "what is the capital", "who are you", "how do i make a garden", "say a word")
LENGTHS = (8, 16, 32, 64)
ERRORS_WHEN_BUSY = (408, 429, 503)
QUIET_SECONDS, BACK_SECONDS = 30.0, 240.0


class Wrong(AssertionError):
    """The server did something that it must not do."""


@dataclass
class Round:
    """What came of one round."""

    outcomes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Every one of them is a defect."""

    seconds: float = 0.0
    killed: float = 0.0
    """When the copy was killed, of ``time.monotonic``."""

    left_over: int = 0
    """Rows in the engines after everyone has gone."""

    memory: dict[str, int] = field(default_factory=dict)
    """Bytes by kind of process."""


@dataclass(frozen=True)
class Request:
    path: str
    body: dict
    expected: str | None = None
    """Its text, where that is certain."""


def requests(server: Server, tokens: tuple[int, ...] = LENGTHS) -> list[Request]:
    """Everything that is asked, with the text that greedy ones get when nobody else asks."""
    made = []
    models = [server.base, *server.trials[:3]]
    for i, prompt in enumerate(WORDS):
        for model in models:
            body = {"model": model, "max_tokens": tokens[i % len(tokens)], "ignore_eos": True}
            made.append(Request("/v1/completions", {**body, "prompt": prompt, "temperature": 0}))
            messages = [{"role": "user", "content": prompt}]
            made.append(Request("/v1/chat/completions", {**body, "messages": messages, "temperature": 0}))
            made.append(Request("/v1/chat/completions", {**body, "messages": messages, "top_p": 0.9}))
    return [request if request.body.get("temperature") != 0 else _answered(server, request) for request in made]


def _answered(server: Server, request: Request) -> Request:
    response = server.post(request.path, **request.body)
    return Request(request.path, request.body, _text(response.json()["choices"][0]))


def _text(choice: dict) -> str:
    if "text" in choice:
        return choice["text"]
    return (choice.get("message") or choice.get("delta") or {}).get("content") or ""


# ----- one request -----


def error_of(status: int, body: dict) -> str:
    """ "status" of an error in the API's form. Raises Wrong for any other body."""
    error = body.get("error")
    if not isinstance(error, dict) or not {"message", "type", "param", "code"} <= error.keys():
        raise Wrong(f"status {status} with {str(body)[:200]}")
    return str(status)


async def whole(client: httpx.AsyncClient, request: Request) -> str:
    response = await client.post(request.path, json=request.body)
    if response.status_code != 200:
        if response.status_code not in ERRORS_WHEN_BUSY or "retry-after" not in response.headers:
            raise Wrong(f"status {response.status_code} without Retry-After: {response.text[:200]}")
        return error_of(response.status_code, response.json())
    answer = response.json()
    (choice,) = answer["choices"]
    _check(request, _text(choice), [choice["finish_reason"]], answer["usage"]["completion_tokens"])
    return "answered"


async def streamed(client: httpx.AsyncClient, request: Request, leave_after: int | None = None) -> str:
    """``leave_after``: go away after so many events."""
    body = {**request.body, "stream": True, "stream_options": {"include_usage": True}}
    text, reasons, n_tokens, events, ended = "", [], 0, 0, False
    async with client.stream("POST", request.path, json=body) as response:
        if response.status_code != 200:
            if response.status_code not in ERRORS_WHEN_BUSY or "retry-after" not in response.headers:
                raise Wrong(f"status {response.status_code} without Retry-After")
            return error_of(response.status_code, json.loads(await response.aread()))
        error = None
        async for line in response.aiter_lines():
            if not line:
                continue
            if ended or not line.startswith("data: "):
                raise Wrong(f"a line that does not belong there: {line[:200]}")
            if line == "data: [DONE]":
                ended = True
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                error = error_of(200, event)
                continue
            for choice in event["choices"]:
                text += _text(choice)
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
            events += 1
            if events == leave_after:
                return "cancelled"
    if not ended:
        raise Wrong("a stream without its end")
    if error:
        if reasons:
            raise Wrong(f"an error after the answer had ended with {reasons}")
        return "error in the stream"
    _check(request, text, reasons, n_tokens)
    return "answered"


def _check(request: Request, text: str, reasons: list[str], n_tokens: int) -> None:
    if reasons != ["length"] or n_tokens != request.body["max_tokens"]:
        raise Wrong(f"{n_tokens} tokens instead of {request.body['max_tokens']}, finish reasons {reasons}")
    if request.expected is not None and text != request.expected:
        raise Wrong(f"another text than alone: {text!r} instead of {request.expected!r}")


async def cancelled(client: httpx.AsyncClient, request: Request, generator: random.Random) -> str:
    """In the middle of a stream, or while waiting for the whole answer."""
    if generator.random() < 0.5:
        return await streamed(client, request, leave_after=generator.randint(1, 3))
    try:
        return await asyncio.wait_for(whole(client, request), generator.uniform(0.01, 0.3))
    except asyncio.TimeoutError:
        return "cancelled"


async def malformed(client: httpx.AsyncClient, request: Request, generator: random.Random) -> str:
    """Must be refused, and for the right reason."""
    chat, body = "/v1/chat/completions", request.body
    kinds: list[tuple[int, str, dict]] = [
        (400, request.path, {"content": b'{"model": ', "headers": {"Content-Type": "application/json"}}),
        (400, chat, {"json": {"model": body["model"]}}),
        (400, request.path, {"json": {**body, "temperature": 9}}),
        (400, request.path, {"json": {**body, "logit_bias": {"99999999": 1}}}),
        (400, request.path, {"json": {**body, "no_such_field": 1}}),
        (400, "/v1/completions", {"json": {"model": body["model"], "prompt": "word " * 5000}}),
        (404, request.path, {"json": {**body, "model": "no-such-model"}}),
    ]
    if "Authorization" in client.headers:
        kinds.append((401, request.path, {"json": body, "headers": {"Authorization": "Bearer wrong"}}))
    expected, path, content = generator.choice(kinds)
    response = await client.post(path, **content)
    if response.status_code != expected:
        raise Wrong(f"{response.status_code} instead of {expected} for {path}: {response.text[:200]}")
    error_of(response.status_code, response.json())
    return "malformed, refused"


# ----- a round -----


async def _round(server: Server, asked: list[Request], n: int, connections: int, seed: int) -> Round:
    result = Round()
    left: Iterator[int] = iter(range(n))
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    victims = server.engines()

    async def reader(client: httpx.AsyncClient) -> None:
        for number in left:
            generator = random.Random(f"{seed} {number}")
            request, kind = generator.choice(asked), generator.random()
            try:
                if kind < CANCELLED:
                    outcome = await cancelled(client, request, generator)
                elif kind < CANCELLED + MALFORMED:
                    outcome = await malformed(client, request, generator)
                else:
                    outcome = await (streamed if generator.random() < 0.5 else whole)(client, request)
            except (Wrong, httpx.HTTPError, KeyError, ValueError) as error:
                outcome = "wrong"
                result.wrong.append(f"{type(error).__name__}: {error}")
            result.outcomes[outcome] += 1
            if result.outcomes.total() == n // 2:
                victims[0].kill()
                result.killed = time.monotonic()

    start = time.perf_counter()
    async with httpx.AsyncClient(base_url=server.url, headers=server.headers, limits=limits, timeout=300) as client:
        await asyncio.gather(*(reader(client) for _ in range(connections)))
    result.seconds = time.perf_counter() - start
    return result


def play(server: Server, asked: list[Request], n: int, connections: int, seed: int) -> Round:
    """One round; returns when everything is quiet and both copies are there again."""
    result = asyncio.run(_round(server, asked, n, connections, seed))
    _wait(lambda: server.running() == 0, QUIET_SECONDS)
    result.left_over = server.running()
    # The statistics still know the copy that died: together with its successor, not loaded yet, it looks like two.
    time.sleep(max(0.0, result.killed + STATS_KEPT + 1.0 - time.monotonic()))
    if not _wait(lambda: len(server.engines()) == 2 and _replicas(server) == 2, BACK_SECONDS):
        result.wrong.append(f"{_replicas(server)} copies instead of 2")
    _wait(lambda: server.get("/ready").status_code == 200, QUIET_SECONDS)
    for kind in ("Engine-0", "Api"):
        result.memory[kind] = private_bytes(server.processes(kind))
    return result


def _replicas(server: Server) -> int:
    return server.get("/api/stats").json()["engines"][server.base]["replicas"]


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return met


def spread(sizes: list[int]) -> float:
    """How far the farthest is from the middle of the largest and the smallest, as a share of it."""
    return (max(sizes) - min(sizes)) / (max(sizes) + min(sizes))


# ----- the table -----


def table(rounds: list[Round], head: str) -> str:
    kinds = sorted({outcome for result in rounds for outcome in result.outcomes} - {"wrong"})
    lines = [
        "## Load (`python -m benchmarks.serve_load`)",
        "",
        head,
        "",
        f"| round | requests/s | {' | '.join(kinds)} | defects | rows left over | engines, MB | API, MB |",
        "|---" * (len(kinds) + 6) + "|",
    ]
    for number, result in enumerate(rounds, start=1):
        counts = " | ".join(str(result.outcomes[kind]) for kind in kinds)
        memory = " | ".join(f"{size / 1e6:.0f}" for size in result.memory.values())
        lines.append(
            f"| {number} | {result.outcomes.total() / result.seconds:.0f} | {counts} | {len(result.wrong)}"
            f" | {result.left_over} | {memory} |"
        )
    changes = ", ".join(f"{kind} {spread([r.memory[kind] for r in rounds]):.1%}" for kind in rounds[0].memory)
    return "\n".join([*lines, "", f"Memory over the rounds, half of the largest difference: {changes}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-table", action="store_true", help="leave RESULTS.md as it is")
    settings = parser.parse_args()
    end_in_order()
    with tempfile.TemporaryDirectory(prefix="bench-load-") as name:
        run = make_run(Path(name))
        with serving(Path(name), str(run), "--replicas", "2", "--no-pages") as server:
            asked = requests(server)
            rounds = []
            for number in range(settings.rounds):
                result = play(server, asked, settings.requests, settings.connections, number)
                print(f"round {number}: {dict(result.outcomes)} {result.wrong[:5]}", flush=True)
                rounds.append(result)
    head = (
        f"{settings.requests} requests a round over {settings.connections} connections, two copies of the organism,"
        " one of them killed half-way through each round."
    )
    print(table(rounds, head))
    if not settings.no_table:
        write_section("serve_load", table(rounds, head))
    if any(result.wrong or result.left_over for result in rounds):
        raise SystemExit("the server did what it must not do: see above")


if __name__ == "__main__":
    main()
