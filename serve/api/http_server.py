"""The API's own HTTP server, past Serve's proxy.

Serve's proxy hands every piece of every answer from one Python process to another, which costs more than a token of a
small model. Where it is asked to (``ServeArgs.listen``), a replica of the API speaks HTTP itself, with the server that
Serve's proxy uses too. Serve still starts, watches and replaces the replica, and reaches the engines for it.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bruno_ray.errors import SettingsError
from serve.errors import RequestError

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 90
CLEARING_UP_SECONDS = 10.0
"""For a stream whose client has gone to end by itself."""

TAKEN_SECONDS = 60.0
"""For which a port may still be held by the replica that this one replaces."""


@asynccontextmanager
async def listening(app: ASGIApp, address: str, route_prefix: str, shared: bool) -> AsyncIterator[None]:
    """Serve ``app`` at ``address`` ("HOST:PORT"), under ``route_prefix``, until the block ends.

    ``shared``: several processes take turns with the connections. Raises SettingsError if the port stays taken.
    """
    listener = await _listener(address, shared)
    config = uvicorn.Config(
        Mounted(app, route_prefix),
        lifespan="off",  # Serve has seen to it
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await serving


class _Server(uvicorn.Server):
    """The process's signals are Ray's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _listener(address: str, shared: bool) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = asyncio.get_running_loop().time() + TAKEN_SECONDS
    while True:
        try:
            return socket.create_server((host, int(port)), family=family, backlog=2048, reuse_port=shared)
        except OSError as error:
            if asyncio.get_running_loop().time() > deadline:
                raise SettingsError(f"cannot listen on {address} ({error.strerror or error}): choose another") from None
        await asyncio.sleep(0.2)


class Mounted:
    """``app`` under a path, and without clients that have gone: what runs for one of them is cancelled, as Serve's
    proxy does. An application that answers as a whole would go on to the end."""

    def __init__(self, app: ASGIApp, route_prefix: str) -> None:
        self._app = app
        self._prefix = route_prefix.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] != self._prefix and not scope["path"].startswith(f"{self._prefix}/"):
            error = RequestError(404, f"Everything is under {self._prefix}/ here.")
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        scope = {**scope, "root_path": scope.get("root_path", "") + self._prefix}
        messages: asyncio.Queue[Message] = asyncio.Queue(1)  # no more of a body is read than the application wants
        started = False

        async def note_and_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        answering = asyncio.create_task(self._app(scope, messages.get, note_and_send))
        watching = asyncio.create_task(_watch(receive, messages))
        try:
            await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
            if started:  # a stream notices by itself, and may have something to clear up
                await asyncio.wait((answering,), timeout=CLEARING_UP_SECONDS)
        finally:  # also when this server ends
            watching.cancel()
            if not answering.done():
                answering.cancel()
        try:
            await answering
        except asyncio.CancelledError:
            logger.debug("a client went away")


async def _watch(receive: Receive, messages: "asyncio.Queue[Message]") -> None:
    """Pass on what the client sends. Returns once it has gone."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            with suppress(asyncio.QueueFull):  # it has not even read what was sent
                messages.put_nowait(message)
            return
        await messages.put(message)
