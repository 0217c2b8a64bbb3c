"""Replicas die and are replaced, and their number follows the load."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from benchmarks import serve_load
from tests.serve.conftest import PREFIX
from tests.serve.server import START_SECONDS, Server
from tests.serve.test_load import check_round
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = {"prompt": "tell me", "max_tokens": 240, "ignore_eos": True, "temperature": 0, "n": 4}


def test_everything_is_below_the_prefix(copies: Server) -> None:
    assert copies.post("/v1/completions", model=copies.base, prompt="tell me", max_tokens=1).status_code == 200
    above = copies.url.removesuffix(PREFIX)
    assert httpx.get(f"{above}/v1/models", timeout=60).status_code == 404


def resends(server: Server) -> float:
    lines = server.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("bruno_resent_requests_total"))


def wait_until_ready(server: Server) -> None:
    wait_for(lambda: server.get("/ready").status_code == 200, "the server is ready", START_SECONDS)


def test_a_replica_that_dies_is_replaced_and_nothing_that_was_not_begun_is_lost(copies: Server) -> None:
    expected = copies.post("/v1/completions", model=copies.base, **LONG).json()["choices"][0]["text"]
    before = {engine.pid for engine in copies.engines()}
    resent = resends(copies)
    streamed: list[str] = []
    begun, killed = threading.Event(), threading.Event()

    def stream() -> None:
        with copies.client(300) as client:
            body = {"model": copies.base, **LONG, "n": 32, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    streamed.append(line)
                    begun.set()

    def whole(_: int) -> list[httpx.Response]:
        """Asks again until the replica was killed, so that an answer is under way when it dies."""
        answers = []
        with copies.client(300) as client:
            while not killed.is_set():
                answers.append(client.post("/v1/completions", json={"model": copies.base, **LONG}))
        return answers

    with ThreadPoolExecutor(9) as pool:
        asking = [pool.submit(whole, i) for i in range(8)]
        try:
            wait_for(lambda: copies.running() > 0, "the engine is busy", interval_s=0.01)
            broken = pool.submit(stream)
            assert begun.wait(60)
            for engine in copies.engines():
                engine.kill()
        finally:
            killed.set()
        broken.result()
        for answer in (answer for answers in asking for answer in answers.result()):
            assert answer.status_code == 200, answer.text
            assert {choice["text"] for choice in answer.json()["choices"]} == {expected}
    assert resends(copies) > resent  # the answers had been asked for when the replica died
    # The stream had begun: it ends with an error in its own format.
    events = [line.removeprefix("data: ") for line in streamed if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["type"] == "server_error"
    wait_until_ready(copies)
    assert (after := {engine.pid for engine in copies.engines()}) and not after & before
    wait_for(lambda: copies.running() == 0, "nothing is left over")  # figures of the dead one are kept for 10 s


def test_replicas_come_when_there_is_much_to_do(copies: Server) -> None:
    stop = threading.Event()

    def load(_: int) -> set[int]:
        statuses = set()
        with copies.client(300) as client:
            while not stop.is_set():
                statuses.add(client.post("/v1/completions", json={"model": copies.base, **LONG}).status_code)
        return statuses

    def copies_now() -> int:
        """A dead one's figures are kept for a while, and a new one's process is there before it can answer."""
        return min(copies.get("/api/stats").json()["engines"][copies.base]["replicas"], len(copies.engines()))

    with ThreadPoolExecutor(24) as pool:
        loads = [pool.submit(load, i) for i in range(24)]
        try:
            wait_for(lambda: copies_now() == 2, "there are two copies", START_SECONDS, copies_now, interval_s=1)
        finally:
            stop.set()
        assert set().union(*(entry.result() for entry in loads)) == {200}


def test_a_crowd_while_one_of_two_copies_dies(copies: Server) -> None:
    """A short form of ``test_load.py``; the test before has brought the second copy."""
    assert len(copies.engines()) == 2
    check_round(serve_load.play(copies, serve_load.requests(copies), n=120, connections=32, seed=0), 120)
