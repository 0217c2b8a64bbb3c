"""The chat page's client of our own HTTP API, in the same process.

The page must reach the API under any route prefix, proxy or tunnel, and from whichever node its replica is on. So it
does not connect to anything: it hands ASGI requests to the application it is mounted in, with the key of the person
who uses the page, and gets what any HTTP client would get.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Scope

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """What the API said was wrong, on one line. Shown where the answer would have been."""


@dataclass
class _Exchange:
    """One request that is being answered; ``parts`` ends with None."""

    app: ASGIApp
    scope: Scope
    body: bytes
    status: int = 0
    parts: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task | None = None
    sent: bool = False

    def start(self) -> None:
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self.app(self.scope, self._receive, self._send)
        except Exception:  # a server would log it and close the connection; the reader then has no good status
            logger.exception("%s %s failed", self.scope["method"], self.scope["path"])
            self.status = 500
        finally:
            self.parts.put_nowait(None)

    async def _receive(self) -> Message:
        if not self.sent:
            self.sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body" and message.get("body"):
            self.parts.put_nowait(message["body"])

    async def close(self) -> None:
        """What a server does when its client has gone: tell the application, then cancel it."""
        self.gone.set()
        if self.task is None or self.task.done():
            return
        self.task.cancel()
        await asyncio.wait([self.task])


class ChatStream:
    """One streamed answer: iterate over its pieces of text; ``stop`` ends it from elsewhere.

    Attributes:
        finish_reason: as the API gave it, or ``stopped``.
        usage: tokens as the API counted them, ``{}`` until the end.
    """

    def __init__(self, exchange: _Exchange):
        self._exchange = exchange
        self.finish_reason: str | None = None
        self.usage: dict[str, int] = {}

    def stop(self) -> None:
        self.finish_reason = "stopped"
        self._exchange.parts.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[str]:
        self._exchange.start()
        try:
            async for data in self._data():
                if "error" in data:
                    raise ApiError(_reason(data, self._exchange.status))
                self.usage = data.get("usage") or self.usage
                for choice in data.get("choices", ()):
                    self.finish_reason = choice.get("finish_reason") or self.finish_reason
                    if piece := (choice.get("delta") or {}).get("content"):
                        yield piece
        finally:
            await self._exchange.close()
        if self.finish_reason is None:
            raise ApiError("the server ended the answer half-way: send it again")

    async def _data(self) -> AsyncIterator[dict[str, Any]]:
        """The JSON of each server-sent event; the whole body as one if it is no event stream."""
        rest = b""
        while (part := await self._exchange.parts.get()) is not None:
            if self.finish_reason == "stopped":
                return
            *lines, rest = (rest + part).split(b"\n")
            if self._exchange.status != 200:
                rest = b"\n".join([*lines, rest])
                continue
            for line in lines:
                content = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and content != b"[DONE]":
                    yield json.loads(content)
        if self._exchange.status != 200 and self.finish_reason != "stopped":
            yield {"error": _error_of(rest)}


class Api:
    """Requests to the application ``app``."""

    def __init__(self, app: ASGIApp):
        self._app = app

    def _exchange(self, method: str, path: str, key: str, body: Any = None, query: str = "") -> _Exchange:
        content = b"" if body is None else json.dumps(body).encode()
        headers = [(b"host", b"in-process"), (b"accept", b"application/json")]
        if body is not None:
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        if key:
            headers.append((b"authorization", f"Bearer {key}".encode("utf-8", "replace")))
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 0),
            "server": ("in-process", 80),
            "state": {},
        }
        return _Exchange(self._app, scope, content)

    async def get(self, path: str, key: str, query: str = "") -> Any:
        """JSON of ``GET path``. Raises ApiError unless the status is 200."""
        exchange = self._exchange("GET", path, key, query=query)
        exchange.start()
        content = b""
        try:
            while (part := await exchange.parts.get()) is not None:
                content += part
        finally:
            await exchange.close()
        if exchange.status != 200:
            raise ApiError(_reason({"error": _error_of(content)}, exchange.status))
        return json.loads(content)

    def chat(self, request: dict[str, Any], key: str) -> ChatStream:
        """``POST /v1/chat/completions``, streamed with usage. Nothing is sent before it is iterated over."""
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        return ChatStream(self._exchange("POST", "/v1/chat/completions", key, body))


def _error_of(content: bytes) -> Any:
    try:
        return json.loads(content).get("error")
    except (ValueError, AttributeError):
        return content.decode("utf-8", "replace")


def _reason(data: dict[str, Any], status: int) -> str:
    error = data.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    line = " ".join(str(message or "no reason was given").split())
    return line if status == 200 else f"{line} ({status})"
