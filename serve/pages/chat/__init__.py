"""The chat page, mounted in the application whose API it uses."""

import re

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.pages.chat.client import Api
from serve.pages.chat.page import HERE, Page

PATH = "/chat"

LOOKS_EVERY_SECONDS = 0.02
"""For clicks."""

# Answers are shown as markdown, and a model may write an image of any address: nothing is loaded from elsewhere.
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'"

# Gradio's routes that a page without files, logins and media needs; the others let a stranger upload, fetch or record.
ROUTES = re.compile(
    r"/(config|theme\.css|favicon\.ico|(assets|static|svelte)/.*"
    r"|gradio_api/(queue/(join|data|status)|heartbeat/.*|app_id|startup-events|cancel|reset))?/?"
)


def mount(app: FastAPI, *, auth_required: bool) -> None:
    """Mount the chat page at ``/chat/``. To be called in the ingress' builder, before Serve wraps the application.

    The page itself is open, as any login page is; all it can do is ask ``app``'s own API with the key it was given. A
    middleware of ``app`` that asks for the key must let ``/chat`` through.

    Args:
        auth_required: whether the page shows a field for the key.
    """

    @app.get(PATH, include_in_schema=False)
    async def chat_without_slash() -> Response:
        # Relative, unlike the redirect of a mount: right under any prefix and behind any proxy.
        return Response(status_code=307, headers={"Location": PATH.removeprefix("/") + "/"})

    page = Page(Api(app), auth_required)
    page.blocks.queue(default_concurrency_limit=None, max_size=512, api_open=False)
    gr.mount_gradio_app(
        app,
        page.blocks,
        path=PATH,
        footer_links=[],
        run_history=False,  # would keep every request in the browser's storage, with its key
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gr.themes.Default(
            primary_hue="slate",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],  # the viewer's own: nothing is fetched
            font_mono=["ui-monospace", "monospace"],
        ),
        css=(HERE / "page.css").read_text(),
    )
    # Gradio looks for clicks a thousand times a second, in the loop that passes on everybody's answers.
    page.blocks._queue.sleep_when_free = page.blocks._queue.progress_update_sleep_when_free = LOOKS_EVERY_SECONDS
    app.routes[-1].app = _Adapted(app.routes[-1].app, (HERE / "page.js").read_text())


class _Adapted:
    """Gradio's application with our script in its page, and without what the page does not need.

    The script must run before Gradio's own, which that of `mount_gradio_app(head=...)` does not.
    """

    def __init__(self, app: ASGIApp, script: str):
        self._app = app
        self._script = f'<link rel="icon" href="data:,"><script>{script}</script>'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else None
        if path is None:
            await self._app(scope, receive, send)
        elif not ROUTES.fullmatch(path):
            await Response(status_code=404)(scope, receive, send)
        elif path in ("", "/"):
            plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
            await self._app({**scope, "headers": plain}, receive, _Page(send, self._script))
        else:
            await self._app(scope, receive, send)


class _Page:
    """Passes a response on; if it is HTML, with ``script`` in it and nothing that assumes a host or a prefix."""

    def __init__(self, send: Send, script: str):
        self._send = send
        self._script = script
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        headers = [pair for pair in self._start["headers"] if pair[0].lower() != b"content-length"]
        if any(name.lower() == b"content-type" and b"text/html" in value for name, value in headers):
            self._body = self._adapted(self._body.decode()).encode()
            headers.append((b"content-security-policy", POLICY))
        headers.append((b"content-length", str(len(self._body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": self._body})

    def _adapted(self, html: str) -> str:
        html = html.replace('<link rel="manifest" href="/manifest.json" />', "")
        html = re.sub(r'const root = "[^"]*";', "const root = window.gradio_config.root;", html, count=1)
        before, configuration, after = html.partition("window.gradio_config = ")
        value, end, after = after.partition("</script>")
        return before + configuration + value + end + self._script + after
