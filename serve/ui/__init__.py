"""The chat page, mounted in the application whose API it uses."""

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.ui.client import Api
from serve.ui.page import HERE, Page

PATH = "/chat"


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
    page.blocks.queue(max_size=512, api_open=False)
    script = (HERE / "page.js").read_text()
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
        theme=gr.themes.Default(),
        css=(HERE / "page.css").read_text(),
        head=f'<link rel="icon" href="data:,"><script>{script}</script>',
    )
    app.routes[-1].app = _WithoutUploads(app.routes[-1].app)


class _WithoutUploads:
    """The page takes no files, and its upload route would let anyone fill the disk."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "/gradio_api/upload" in scope["path"]:
            await Response(status_code=404)(scope, receive, send)
        else:
            await self._app(scope, receive, send)
