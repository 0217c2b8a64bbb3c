"""A server with little room, open to others, below a prefix: what it refuses, who gets in, what it leaves behind."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve.server import Server, serving, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ORIGIN = "https://chat.example.org"
LONG = {"prompt": "tell me", "max_tokens": 30_000, "ignore_eos": True}
"""More than any machine writes in the time that a request has here."""

ROOM = ("--max-rows", "2", "--max-waiting", "2", "--request-timeout", "5")
CONTEXT = 32_768


@pytest.fixture(scope="module")
def small(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    where = ("--host", "0.0.0.0", "--route-prefix", "/deep/down", "--cors-origin", ORIGIN)
    folder = tmp_path_factory.mktemp("small")
    model = shutil.copytree(served_run / "model", folder / "long")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    with serving(folder, "--model", str(model), *where, *ROOM, "--no-pages", key="") as server:
        yield server


def test_where_others_can_connect_a_key_is_made_and_printed_once(small):
    assert re.fullmatch(r"bruno-[\w-]{40,}", small.key)
    assert httpx.get(f"{small.url}/v1/models", timeout=60).status_code == 401
    assert httpx.get(f"{small.url}/health", timeout=60).status_code == 200
    assert small.get("/v1/models").status_code == 200
    assert small.logs().count(small.key) == 1


def test_everything_is_below_the_prefix(small):
    assert small.post("/v1/completions", model=small.saved, prompt="tell me", max_tokens=1).status_code == 200
    above = small.url.removesuffix("/deep/down")
    assert httpx.get(f"{above}/v1/models", headers=small.headers, timeout=60).status_code == 404
    assert small.get("/chat/").status_code == 404  # --no-pages


def test_a_request_that_takes_too_long_is_a_408(small):
    answer = small.post("/v1/completions", model=small.saved, **LONG)
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "timeout"
    # In a stream that has begun, an event says it.
    with small.client() as client:
        body = {"model": small.saved, **LONG, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            text = response.read().decode()
    assert '"code":"timeout"' in text and text.endswith("data: [DONE]\n\n")


def test_more_than_there_is_room_for_is_a_429_that_says_when_to_come_back(small):
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(small.post, "/v1/completions", model=small.saved, **LONG) for _ in range(24)]
        answers = [entry.result() for entry in asked]
    assert {answer.status_code for answer in answers} == {408, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"


def test_only_named_pages_may_use_the_api_from_a_browser(small):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://elsewhere.example.org", None)):
        headers = {"Origin": origin, **asks}
        preflight = httpx.options(f"{small.url}/v1/chat/completions", headers=headers, timeout=60)
        assert preflight.headers.get("access-control-allow-origin") == allowed
        assert preflight.status_code == (200 if allowed else 400)
        answer = httpx.get(f"{small.url}/v1/models", headers={"Origin": origin, **small.headers}, timeout=60)
        assert answer.headers.get("access-control-allow-origin") == allowed


def test_ctrl_c_leaves_nothing_behind(small):
    assert len(processes_of(small)) > 3
    assert small.stop() == 0
    wait_for(lambda: not processes_of(small), 90)  # Ray's workers and agents end by themselves, after their raylet
    assert "Traceback" not in small.output.read_text()


def processes_of(server: Server) -> list[str]:
    """Command lines of everything that was started for a server and is still there."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        environ = process.info["environ"] or {}
        if process.info["status"] != psutil.STATUS_ZOMBIE and environ.get("RAY_TMPDIR") == str(server.ray):
            found.append(" ".join(process.info["cmdline"] or []))
    return found
