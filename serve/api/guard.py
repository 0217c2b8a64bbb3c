"""What every HTTP request passes first: the key, the size, the count. Plain ASGI, so that streams and disconnects pass
through untouched."""

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.auth import Keys
from serve.errors import RequestError
from serve.metrics import Metrics

OPEN_PATHS = ("/health", "/ready")
OPEN_FOLDERS = ("/chat", "/study")
"""Pages: static, or with a login of their own."""


class Guard:
    """Answers 401 without a good key, 413 to what is too large; counts what is answered."""

    def __init__(self, app: ASGIApp, keys: Keys | None, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._max_body = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._objection(scope)
            if error is not None:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, counting)
            else:
                await self._app(scope, self._limited(receive), counting)
        finally:
            route = scope.get("route")
            self._metrics.request(getattr(route, "path", "other"), status)

    def _objection(self, scope: Scope) -> RequestError | None:
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"content-length")}
        path = path_of(scope)
        in_folder = any(path == folder or path.startswith(f"{folder}/") for folder in OPEN_FOLDERS)
        if self._keys is not None and path not in OPEN_PATHS and not in_folder:
            authorization = headers.get(b"authorization", b"").decode("latin-1")
            if not self._keys.accept_header(authorization):
                message = "The key is wrong." if authorization else "No key was given."
                return RequestError(
                    401,
                    f"{message} Send the header Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            return self._too_large()
        return None

    def _too_large(self) -> RequestError:
        return RequestError(
            413, f"The request is larger than {self._max_body} bytes.", code="request_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip

    def _limited(self, receive: Receive) -> Callable:
        """``receive`` for a body that does not say its length."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body:
                    raise HTTPException(413, str(self._too_large()))
            return message

        return limited


def path_of(scope: Scope) -> str:
    """The path without the prefix that the application is mounted under."""
    root = scope.get("root_path", "").rstrip("/")
    path = scope["path"]
    return path[len(root) :] or "/" if root and path.startswith(f"{root}/") else path
