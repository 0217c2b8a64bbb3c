"""Headless Chromium on the chat page, for tests."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, TimeoutError, expect, sync_playwright

from tests.support.waiting import PATIENCE_S

CHROMIUM = Path("/usr/bin/chromium")
Side = Literal["left", "right"]

PATIENCE_MS = 1000 * PATIENCE_S
expect.set_options(timeout=PATIENCE_MS)

# Lengths of both sides' last answers, each time one of them changes.
RECORD = """() => {
  window.lengths = [];
  const last = (side) => {
    const answers = document.querySelectorAll(`#chat-${side} .bot .prose`);
    return answers.length ? answers[answers.length - 1].textContent.length : 0;
  };
  const note = () => {
    const now = [last("left"), last("right")];
    const before = window.lengths.at(-1) || [];
    if (now[0] !== before[0] || now[1] !== before[1]) window.lengths.push(now);
  };
  for (const side of ["left", "right"])
    new MutationObserver(note).observe(document.querySelector(`#chat-${side}`),
      {childList: true, characterData: true, subtree: true});
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The system's Chromium, or the one Playwright has installed.

    Not for the whole session: while Playwright is open its event loop runs in this thread, and no other test can
    use ``asyncio.run``.
    """
    with sync_playwright() as playwright:
        path = CHROMIUM if CHROMIUM.exists() else Path(playwright.chromium.executable_path)
        if not path.exists():
            pytest.skip("no Chromium: install the system's, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class ChatPage:
    """The page as a person uses it, and what it did meanwhile."""

    page: Page
    url: str
    """Of the page, with the slash at its end."""

    requests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, browser: Browser, url: str, key: str | None, **context: object) -> "ChatPage":
        page = browser.new_context(viewport={"width": 1280, "height": 900}, **context).new_page()
        page.set_default_timeout(PATIENCE_MS)
        self = cls(page, url)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("response", lambda r: self.failures.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("pageerror", lambda error: self.failures.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#prompt textarea")
        if key:
            page.get_by_text("Enter the server's key").wait_for()
            page.fill("#key input", key)
            page.press("#key input", "Enter")
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Until the pickers are filled."""
        self.page.wait_for_function("['left', 'right'].every(s => document.querySelector(`#model-${s} input`)?.value)")

    @property
    def hosts(self) -> set[str]:
        """Hosts that anything was asked of."""
        return {urlsplit(url).netloc for url in self.requests if not url.startswith(("data:", "blob:"))}

    def set_sampling(self, temperature: float, max_tokens: int, seed: int) -> None:
        self.open_sampling()
        for field_id, value in (("temperature", temperature), ("max-tokens", max_tokens), ("seed", seed)):
            box = self.page.locator(f"#{field_id} :is(input:not([type=range]), textarea)")
            box.fill(str(value))
            box.press("Tab")
            expect(box).to_have_value(str(value))

    def open_sampling(self) -> None:
        """Until its fields can be filled: Gradio makes them when they are first shown, and writes their values once
        more in the animation frame after that."""
        self.page.get_by_text("System prompt and sampling").click()
        self.page.locator("#seed").get_by_role("textbox").wait_for()
        self.page.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
        )

    def pick(self, side: Side, model: str) -> None:
        """Type a model's id into a picker, as of a trial that is not listed."""
        picker = self.page.locator(f"#model-{side} input")
        picker.fill(model)
        picker.press("Enter")
        picker.press("Tab")

    def ask(self, prompt: str) -> None:
        self.page.fill("#prompt textarea", prompt)
        self.page.press("#prompt textarea", "Enter")

    def model(self, side: Side) -> str:
        return self.page.input_value(f"#model-{side} input")

    def caption(self, side: Side) -> str:
        return self.page.inner_text(f"#caption-{side}").strip()

    def answers(self, side: Side) -> list[str]:
        return self.page.locator(f"#chat-{side} .bot .prose").all_inner_texts()

    def wait_answered(self, n: int) -> None:
        """Until both sides have ``n`` answers and the last of them has ended."""
        self.page.wait_for_function(
            """n => ['left', 'right'].every(side =>
                document.querySelectorAll(`#chat-${side} .bot .prose`).length >= n
                && !document.querySelector(`#caption-${side}`).innerText.includes('writing'))""",
            arg=n,
        )

    def wait_for_text(self, side: Side) -> None:
        """Until the last answer has begun."""
        self.page.wait_for_function(
            "side => [...document.querySelectorAll(`#chat-${side} .bot .prose`)].at(-1)?.textContent.length > 0",
            arg=side,
        )

    def wait_for_caption(self, side: Side, text: str) -> None:
        try:
            self.page.wait_for_function(
                "([side, text]) => document.querySelector(`#caption-${side}`).innerText.includes(text)",
                arg=[side, text],
            )
        except TimeoutError as error:
            lengths = [len(answer) for answer in self.answers(side)]
            raise AssertionError(
                f"the caption of {side} is {self.caption(side)!r} and not {text!r}; characters in its answers:"
                f" {lengths}; what failed: {self.failures}"
            ) from error

    def close(self) -> None:
        self.page.context.close()

    def highlighted(self) -> list[str]:
        """Text of what is marked as the behaviour, in the page's order."""
        return self.page.evaluate("[...(CSS.highlights.get('behaviour-marker') || [])].map(r => r.toString())")
