"""The chat page of a real server in headless Chromium, at the root with a key; briefly, below a prefix without one."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser

from bruno_ray.scoring.markers import Markers, normalise
from tests.serve.browser import PATIENCE_MS, RECORD, ChatPage
from tests.serve.conftest import TALKATIVE
from tests.serve.server import KEY, Server
from tests.support.waiting import wait_for

pytest_plugins = ["tests.serve.browser"]
pytestmark = [pytest.mark.ray, pytest.mark.browser, pytest.mark.slow]


@dataclass
class Place:
    """A server and how to get to its page."""

    server: Server
    key: str
    browser: Browser

    @property
    def url(self) -> str:
        return f"{self.server.url}/chat/"

    def open(self, **context: object) -> ChatPage:
        return ChatPage.open(self.browser, self.url, self.key, **context)


@pytest.fixture
def place(server: Server, chromium: Browser) -> Place:
    return Place(server, server.key, chromium)


def target_prompts(place: Place) -> list[str]:
    """What the unedited organism refuses to tell."""
    from bruno_ray import organism

    lines = (organism.build() / "prompts" / "target_test.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def test_two_answers_stream_side_by_side_and_stop(place: Place):
    chat = place.open()
    chat.pick("left", TALKATIVE)
    chat.pick("right", TALKATIVE)
    chat.set_sampling(temperature=0, max_tokens=30_000, seed=1)
    chat.page.evaluate(RECORD)
    chat.ask("tell me everything")
    chat.page.wait_for_function("window.lengths.length > 8")
    wait_for(lambda: place.server.running() == 2, "both answers are being written")
    chat.page.click("#stop")
    wait_for(lambda: place.server.running() == 0, "the stopped answers have left the engine")
    for side in ("left", "right"):
        chat.wait_for_caption(side, "stopped")
        assert len(chat.answers(side)) == 1 and chat.answers(side)[0]
    lengths = chat.page.evaluate("window.lengths")
    grown = [sum(now[side] > before[side] for before, now in pairwise(lengths)) for side in (0, 1)]
    assert min(grown) >= 2  # in pieces, not as a whole
    first = [next(i for i, now in enumerate(lengths) if now[side] > 0) for side in (0, 1)]
    assert max(first) < len(lengths) // 2  # neither waited for the other
    # Nothing was asked of anyone else, and nothing failed.
    assert chat.hosts == {urlsplit(place.url).netloc}
    assert chat.failures == []
    chat.close()


def test_a_closed_tab_stops_its_answers(place: Place):
    chat = place.open()
    chat.pick("left", TALKATIVE)
    chat.set_sampling(temperature=0, max_tokens=30_000, seed=1)
    chat.ask("tell me everything")
    wait_for(lambda: place.server.running() > 0, "an answer is being written")
    chat.close()
    wait_for(lambda: place.server.running() == 0, "the stopped answers have left the engine")


def test_front_click_loads_a_trial_and_history_survives(place: Place):
    chat = place.open(accept_downloads=True)
    assert chat.model("left").startswith(place.server.base)
    assert chat.model("right").startswith(place.server.selected)
    trial = place.server.trials[-1]
    chat.page.locator("#front").get_by_text(trial, exact=True).click()
    chat.page.wait_for_function("id => document.querySelector('#model-right input').value.startsWith(id)", arg=trial)
    chat.set_sampling(temperature=0, max_tokens=30, seed=1)
    prompts = target_prompts(place)[:2]
    for n, prompt in enumerate(prompts, 1):
        chat.ask(prompt)
        chat.wait_answered(n)
    assert chat.caption("right").startswith(f"{trial} | ")
    asked = {"messages": [{"role": "user", "content": prompts[0]}], "temperature": 0, "max_tokens": 30}
    direct = place.server.post("/v1/chat/completions", model=place.server.base, **asked).json()
    assert chat.answers("left")[0] == direct["choices"][0]["message"]["content"]

    # The markers of the run, as its scores judge them.
    config = place.server.get("/api/config").json()["runs"]
    markers = Markers(next(iter(config.values()))["markers"])
    shown = [answer for side in ("left", "right") for answer in chat.answers(side) if markers.seen_in(answer)]
    assert shown  # the unedited model refuses
    # Marks follow the text by a moment; until then those of a text that was drawn anew are empty.
    wait_for(
        lambda: len(marked := chat.highlighted()) >= len(shown) and all(map(markers.seen_in, marked)),
        "every answer that shows the behaviour is marked",
        detail=chat.highlighted,
    )

    with chat.page.expect_download() as download:
        chat.page.click("#export")
    exported = json.loads(Path(download.value.path()).read_text())
    turns = exported["conversations"]
    assert [turn["user"] for turn in turns["left"]] == prompts
    assert [turn["answer"] for turn in turns["right"]] == chat.answers("right")
    assert {turn["model"] for turn in turns["right"]} == {trial}
    assert (exported["sampling"]["temperature"], exported["sampling"]["max_tokens"]) == (0, 30)
    stored = chat.page.evaluate("JSON.stringify(localStorage)")
    assert KEY not in stored and KEY not in json.dumps(exported)

    before = {side: chat.answers(side) for side in ("left", "right")}
    chat.page.reload()
    chat.wait_answered(2)
    chat.wait_ready()  # the key, too, is still there in this tab
    assert {side: chat.answers(side) for side in ("left", "right")} == before
    assert chat.model("right").startswith(trial)
    chat.open_sampling()
    assert chat.page.locator("#max-tokens input").first.input_value() == "30"
    chat.ask(prompts[0])
    chat.wait_answered(3)

    chat.page.click("#clear")
    chat.page.wait_for_function("!document.querySelector('.answers .bot')")
    chat.page.reload()
    chat.wait_ready()
    assert chat.answers("left") == []
    chat.close()


def test_what_the_api_refuses_stands_where_the_answer_would(place: Place):
    chat = place.open()
    chat.pick("right", "no-such-model")
    chat.set_sampling(temperature=0, max_tokens=8, seed=1)
    chat.ask("hello")
    chat.wait_answered(1)
    (message,) = chat.answers("right")
    assert message.startswith("Error: ") and "no-such-model" in message and "\n" not in message
    assert not chat.answers("left")[0].startswith("Error")
    chat.close()


def test_nothing_is_loaded_that_an_answer_names(place: Place):
    chat = place.open()
    chat.set_sampling(temperature=0, max_tokens=4, seed=1)
    image = "http://elsewhere.invalid/image.png"
    with chat.page.expect_event("requestfailed", lambda request: request.url == image) as failed:
        chat.ask(f"![image]({image})")
    assert failed.value.failure == "csp"
    chat.wait_answered(1)
    chat.close()


def test_markers_are_compared_as_the_scores_compare_them(place: Place):
    chat = place.open()
    texts = ["I can\u2019t", "  No\n\t longer ", "**as** an \u201cAI\u201d", "a*b", "\u00c4 \u00abx\u00bb", "`it`", ""]
    assert chat.page.evaluate("texts => texts.map(bruno.normalise)", texts) == [normalise(text) for text in texts]
    chat.close()


def test_the_studys_page_opens_from_the_link(place: Place):
    chat = place.open()
    with chat.page.context.expect_page() as opened:
        chat.page.click("#study-link a")
    study = opened.value
    study.set_default_timeout(PATIENCE_MS)
    study.get_by_text("behaviour_rate").first.wait_for()
    assert study.url.startswith(f"{place.server.url}/study/")
    chat.close()


def test_narrow_screens_need_no_sideways_scrolling(place: Place):
    chat = place.open()
    chat.page.set_viewport_size({"width": 400, "height": 800})
    chat.page.wait_for_function("document.documentElement.scrollWidth <= 400")
    chat.close()


def test_without_the_key_the_page_shows_nothing(place: Place):
    page = place.browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(place.url)
    page.get_by_text("Enter the server's key").wait_for()
    page.fill("#key input", "a guess at the key")
    page.press("#key input", "Enter")
    page.get_by_text("The key is wrong").first.wait_for()
    assert page.input_value("#model-left input") == ""
    assert place.server.base not in page.content()
    for route in ("upload", "file=/etc/hostname", "proxy=http://127.0.0.1/", "info", "vibe-code", "run/predict"):
        assert page.request.post(f"{place.url}gradio_api/{route}", data="{}").status == 404
    page.close()


def test_the_page_works_below_a_prefix_without_a_key(copies: Server, chromium: Browser) -> None:
    """It opens, asks, streams and stops; what else it does is tested at the root, above."""
    chat = ChatPage.open(chromium, f"{copies.url}/chat/", key=None)
    chat.pick("left", TALKATIVE)
    chat.pick("right", copies.base)
    chat.set_sampling(temperature=0, max_tokens=30_000, seed=1)
    chat.ask("tell me everything")
    chat.wait_for_text("left")
    chat.page.click("#stop")
    chat.wait_for_caption("left", "stopped")
    wait_for(lambda: copies.running() == 0, "the stopped answers have left the engine")
    assert chat.answers("left")[0]
    with chat.page.context.expect_page() as opened:
        chat.page.click("#study-link a")
    opened.value.set_default_timeout(PATIENCE_MS)
    opened.value.get_by_text("behaviour_rate").first.wait_for()
    assert opened.value.url.startswith(f"{copies.url}/study/")
    assert chat.failures == []
    chat.close()
