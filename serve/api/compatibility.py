"""What clients need beside the routes: web pages elsewhere, and base URLs without /v1. Plain ASGI, as the guard is."""

from collections.abc import Sequence
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.guard import path_of
from serve.errors import RequestError

LOCAL = "local"
"""Among the origins: pages of this machine."""

LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
UNVERSIONED = ("/chat/completions", "/completions", "/models")
FOLDERS = ("/models/",)


class OtherPages(CORSMiddleware):
    """Lets web pages of these origins use the API from a browser (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=[origin for origin in origins if origin != LOCAL],
            allow_origin_regex=LOCAL_ORIGINS if LOCAL in origins else None,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["Retry-After"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """With a body in the API's shape where the answer is no."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        origin = request_headers["origin"]
        reason = f"Pages of {origin} may not use this API: start the server with --cors-origin {origin}"
        if self.is_allowed_origin(origin):
            reason = f"{bytes(response.body).decode()}: the API takes GET, POST and DELETE from web pages."
        error = RequestError(400, reason)
        headers = {name: value for name, value in response.headers.items() if name.startswith(("access", "vary"))}
        return JSONResponse(error.body, error.status, headers)


class Unversioned:
    """Clients whose base URL lacks /v1 find the API all the same: the paths become those with it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = path_of(scope)
            if path in UNVERSIONED or path.startswith(FOLDERS):
                full = f"{scope['path'].removesuffix(path)}/v1{path}"
                scope = {**scope, "path": full, "raw_path": quote(full).encode()}
        await self._app(scope, receive, send)
