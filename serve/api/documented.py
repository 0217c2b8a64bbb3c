"""The error statuses of the routes, for OpenAPI."""

from typing import Any

from serve.api.responses import ErrorBody

RETRY_AFTER = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}


def _error(text: str, **headers: Any) -> dict[str, Any]:
    return {"model": ErrorBody, "description": text, **({"headers": headers} if headers else {})}


COMMON: dict[int | str, dict[str, Any]] = {
    401: _error("No key, or a wrong one", **{"WWW-Authenticate": {"schema": {"type": "string"}}}),
    405: _error("The path does not take this method"),
    413: _error("The request is larger than is read"),
}
"""Of every route but health and readiness."""

BODY = {400: _error("Something in the request is wrong; `param` names it")}
NOT_FOUND = {404: _error("There is nothing of that name")}
UNAVAILABLE = {503: _error("Not ready, or a process has failed; try again later", **RETRY_AFTER)}

GENERATES: dict[int | str, dict[str, Any]] = {
    **BODY,
    **NOT_FOUND,
    **UNAVAILABLE,
    200: {"content": {"text/event-stream": {}}},  # a schema would be taken for that of an event
    408: _error("The answer took longer than a request may"),
    429: _error("Too many requests; try again later", **RETRY_AFTER),
}
