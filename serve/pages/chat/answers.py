"""Streaming one side's answer into the page, and stopping it."""

import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.pages.chat.client import Api, ApiError, ChatStream
from serve.pages.chat.conversation import Turn, messages

REDRAW_SECONDS = 0.08
"""The browser renders the whole answer at each redraw, so not for each token, and for long answers less often."""

REDRAW_CHARACTERS = 1000
"""Length of an answer for which the time between redraws has doubled."""


@dataclass
class RunningStreams:
    """The answers being written, by the browser tab (Gradio's session) they are for."""

    _by_session: dict[str, set[ChatStream]] = field(default_factory=lambda: defaultdict(set))

    @contextmanager
    def holding(self, session: str, stream: ChatStream):
        self._by_session[session].add(stream)
        try:
            yield
        finally:
            self._by_session[session].discard(stream)
            if not self._by_session[session]:
                del self._by_session[session]

    def any(self, session: str) -> bool:
        return session in self._by_session

    def stop(self, session: str) -> None:
        for stream in self._by_session.get(session, ()):
            stream.stop()


@dataclass(frozen=True)
class Sampling:
    system: str = ""
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int | None = None

    def request(self, turns: list[Turn]) -> dict[str, Any]:
        """Body of a chat completion for the last of ``turns``."""
        body = {
            "model": turns[-1]["model"],
            "messages": messages(turns, self.system),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        return body if self.seed is None else {**body, "seed": self.seed}


async def answer(
    api: Api, streams: RunningStreams, session: str, key: str, turns: list[Turn], sampling: Sampling
) -> AsyncIterator[list[Turn]]:
    """Write the answer to the last turn; yields the turns whenever they should be drawn, at last with its end.

    The request is cancelled when the iterator is closed, when its stream is stopped, or when the last turn ends.
    """
    turn = dict(turns[-1])
    stream = api.chat(sampling.request(turns), key)
    started, drawn = time.monotonic(), 0.0
    with streams.holding(session, stream):
        try:
            async with aclosing(aiter(stream)) as pieces:
                async for piece in pieces:
                    turn["answer"] += piece
                    pause = REDRAW_SECONDS * (1 + len(turn["answer"]) / REDRAW_CHARACTERS)
                    if time.monotonic() - drawn >= pause:
                        drawn = time.monotonic()
                        yield [*turns[:-1], turn]
            turn["finish"] = stream.finish_reason
        except ApiError as error:
            turn["error"] = str(error)
    turn["tokens"] = stream.usage.get("completion_tokens")
    turn["seconds"] = round(time.monotonic() - started, 2)
    yield [*turns[:-1], turn]
