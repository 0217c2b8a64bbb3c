"""A server with little room, open to others, below a prefix: what it refuses, who gets in, what it leaves behind."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from playwright.sync_api import Browser

from tests.serve.browser import ChatPage
from tests.serve.conftest import ORIGIN, PREFIX, TALKATIVE
from tests.serve.server import Server
from tests.support.waiting import wait_for

pytest_plugins = ["tests.serve.browser"]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = {"model": TALKATIVE, "prompt": "tell me", "max_tokens": 30_000, "ignore_eos": True}
"""More than any machine writes in the time that a request has here."""


def test_everything_is_below_the_prefix(small: Server) -> None:
    assert small.post("/v1/completions", model=TALKATIVE, prompt="tell me", max_tokens=1).status_code == 200
    above = small.url.removesuffix(PREFIX)
    assert httpx.get(f"{above}/v1/models", timeout=60).status_code == 404


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
        answer = httpx.get(f"{small.url}/v1/models", headers={"Origin": origin}, timeout=60)
        assert answer.headers.get("access-control-allow-origin") == allowed


@pytest.mark.browser
def test_the_page_works_below_a_prefix_without_a_key(small: Server, chromium: Browser) -> None:
    """It opens, asks, streams and stops; what else it does is tested at the root (``test_ui.py``)."""
    chat = ChatPage.open(chromium, f"{small.url}/chat/", key=None)
    chat.pick("left", TALKATIVE)
    chat.pick("right", small.trials[0])
    chat.set_sampling(temperature=0, max_tokens=30_000, seed=1)
    chat.ask("tell me everything")
    chat.wait_for_text("left")
    chat.page.click("#stop")
    chat.wait_for_caption("left", "stopped")
    wait_for(lambda: small.running() == 0, "the stopped answers have left the engine")
    assert chat.answers("left")[0]
    with chat.page.context.expect_page() as opened:
        chat.page.click("#study-link a")
    opened.value.get_by_text("behaviour_rate").first.wait_for(timeout=90_000)
    assert opened.value.url.startswith(f"{small.url}/study/")
    assert chat.failures == []
    chat.close()


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
