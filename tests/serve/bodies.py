"""Every body that a server sends in a test is held against the model that documents it (``serve/api/responses.py``)."""

import json
from typing import Any

import httpx
from pydantic import BaseModel
from starlette.routing import Match

from serve.api import chat, completions, evaluations, models
from serve.api.responses import ChatCompletionChunk, CompletionChunk, ErrorBody

# The routers need a service when they are asked, not when they are made.
ROUTES = [route for router in (chat.router, completions.router, models.router) for route in router(None).routes]
ROUTES += evaluations.router(None, None).routes

CHUNKS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/completions": CompletionChunk,
}


def route_of(method: str, path: str) -> Any:
    """The route that answers, or None for pages and what does not exist."""
    scope = {"type": "http", "method": method, "path": path, "root_path": ""}
    return next((route for route in ROUTES if route.matches(scope)[0] == Match.FULL), None)


def check_body(method: str, path: str, status: int, body: Any) -> None:
    """Raises ValidationError, or AssertionError for a route that documents no body."""
    if status >= 400:
        ErrorBody.model_validate(body, strict=True)
        return
    route = route_of(method, path)
    assert route is not None and route.response_model is not None, f"{method} {path} documents no JSON"
    # As JSON: there a tuple is a list.
    route.response_model.model_validate_json(json.dumps(body), strict=True)


def check_event(path: str, data: str) -> None:
    """What comes after `data: ` in a stream of ``path``. Raises ValidationError."""
    if data == "[DONE]":
        return
    event = json.loads(data)
    model = ErrorBody if "error" in event else CHUNKS[path]
    model.model_validate_json(data, strict=True)


def check_response(response: httpx.Response, prefix: str = "") -> None:
    """For an httpx client: streams are left alone, and the pages."""
    request = response.request
    path = request.url.path.removeprefix(prefix)
    if path.startswith(("/chat/completions", "/completions", "/models")):  # the same routes without /v1
        path = f"/v1{path}"
    is_json = response.headers.get("content-type", "").startswith("application/json")
    if not is_json or path in ("/openapi.json",) or path.startswith(("/chat/", "/study/")):
        return
    response.read()
    check_body(request.method, path, response.status_code, response.json())
