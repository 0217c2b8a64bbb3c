"""The API's own HTTP server, spoken to over sockets."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bruno_ray.errors import SettingsError
from serve.api import http_server
from serve.api.http_server import listening
from tests.serve.server import free_port


class App:
    """Tells where it believes to be; at /slow it answers much later, at /eager before it has read anything, at /stream
    it goes on until it is told that the client has gone, and then has something to clear up."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.cleared_up = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("/slow"):
            self.started.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if scope["path"].endswith("/stream"):
            response: Response = StreamingResponse(self.pieces(), background=BackgroundTask(self.clear_up))
            await response(scope, receive, send)
            return
        body = b""
        if not scope["path"].endswith("/eager"):
            more = True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
        response = JSONResponse({"path": scope["path"], "root": scope["root_path"], "body": len(body)})
        await response(scope, receive, send)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Ends like the stream that Gradio keeps open for each tab."""
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                self.started.set()
                yield b"x"
                await asyncio.sleep(0.05)

    async def clear_up(self) -> None:
        await asyncio.sleep(0.2)
        self.cleared_up.set()


def with_app(use: Callable[[App, str], Awaitable[None]], prefix: str = "/") -> None:
    async def main() -> None:
        app, address = App(), f"127.0.0.1:{free_port()}"
        async with listening(app, address, prefix, shared=False):
            await asyncio.wait_for(use(app, f"http://{address}"), 30)

    asyncio.run(main())


@pytest.mark.parametrize(("prefix", "root"), [("/", ""), ("/some/prefix", "/some/prefix")])
def test_requests_arrive_whole_below_the_prefix(prefix: str, root: str) -> None:
    async def use(app: App, url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            for path, body in (("/what", b""), ("/what", b"x" * 3_000_000), ("/eager", b"x" * 3_000_000)):
                answer = (await client.post(f"{root}{path}", content=body)).json()
                assert (answer["path"], answer["root"]) == (f"{root}{path}", root)
                assert answer["body"] == (0 if path == "/eager" else len(body))
            if root:
                for path in ("/what", "/some/prefixed", "/"):
                    assert (await client.get(path)).status_code == 404

    with_app(use, prefix)


def test_what_runs_for_a_client_that_has_gone_is_cancelled() -> None:
    async def use(app: App, url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            asking = asyncio.create_task(client.post("/slow", content=b"x"))
            await app.started.wait()
            assert not app.cancelled.is_set()
            asking.cancel()
            await app.cancelled.wait()

    with_app(use)


def test_a_stream_whose_client_has_gone_clears_up() -> None:
    async def use(app: App, url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            reading = asyncio.create_task(client.get("/stream"))
            await app.started.wait()
            reading.cancel()
            await app.cleared_up.wait()

    with_app(use)


def test_a_port_that_stays_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(SettingsError, match=f"cannot listen on {address}"):
                async with listening(App(), address, "/", shared=False):
                    pass

    monkeypatch.setattr(http_server, "TAKEN_SECONDS", 0.3)
    asyncio.run(main())


def test_a_port_that_becomes_free_is_taken() -> None:
    """As that of a replica which is being replaced."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            asyncio.get_running_loop().call_later(0.5, taken.close)
            async with listening(App(), f"127.0.0.1:{port}", "/", shared=False):
                async with httpx.AsyncClient(timeout=30) as client:
                    assert (await client.get(f"http://127.0.0.1:{port}/what")).status_code == 200

    asyncio.run(main())
