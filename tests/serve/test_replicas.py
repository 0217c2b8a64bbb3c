"""Replicas die and are replaced, and their number follows the load."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serve.server import Server, serving, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = {"prompt": "tell me", "max_tokens": 240, "ignore_eos": True, "temperature": 0}


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + 200
    while server.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_replica_that_dies_is_replaced_and_nothing_that_was_not_begun_is_lost(server):
    expected = server.post("/v1/completions", model=server.base, **LONG).json()["choices"][0]["text"]
    (engine,) = server.engines()
    streamed: list[str] = []
    begun = threading.Event()

    def stream() -> None:
        with server.client(300) as client:
            body = {"model": server.base, **LONG, "n": 32, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    streamed.append(line)
                    begun.set()

    def whole(_: int) -> httpx.Response:
        with server.client(300) as client:
            return client.post("/v1/completions", json={"model": server.base, **LONG})

    with ThreadPoolExecutor(9) as pool:
        broken = pool.submit(stream)
        assert begun.wait(60)
        answers = [pool.submit(whole, i) for i in range(8)]
        time.sleep(0.2)
        engine.kill()
        broken.result()
        for answer in answers:
            assert answer.result().status_code == 200, answer.result().text
            assert answer.result().json()["choices"][0]["text"] == expected
    # The stream had begun: it ends with an error in its own format.
    events = [line.removeprefix("data: ") for line in streamed if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["type"] == "server_error"
    wait_until_ready(server)
    (new,) = server.engines()
    assert new.pid != engine.pid
    wait_for(lambda: server.running() == 0)  # the figures of the dead one are kept for 10 s


def test_replicas_come_when_there_is_much_to_do(served_run, tmp_path):
    with serving(tmp_path, str(served_run), "--max-replicas", "2", "--no-pages") as server:
        stop = threading.Event()

        def load(_: int) -> set[int]:
            statuses = set()
            with server.client(300) as client:
                while not stop.is_set():
                    statuses.add(
                        client.post("/v1/completions", json={"model": server.base, **LONG, "n": 4}).status_code
                    )
            return statuses

        with ThreadPoolExecutor(24) as pool:
            loads = [pool.submit(load, i) for i in range(24)]
            deadline = time.monotonic() + 240
            try:
                while server.get("/api/stats").json()["engines"][server.base]["replicas"] < 2:
                    assert time.monotonic() < deadline
                    time.sleep(1)
            finally:
                stop.set()
            assert set().union(*(entry.result() for entry in loads)) == {200}
