"""The HTTP application: routes, errors in OpenAI's shape, pages. Wrapped by Ray Serve in ``app.py``."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from bruno_ray import __version__
from serve.api import chat, completions, models
from serve.api import evaluations as evaluation_routes
from serve.api.auth import Keys
from serve.api.compatibility import OtherPages, Unversioned
from serve.api.documented import COMMON
from serve.api.fields import Unsupported
from serve.api.guard import Guard
from serve.api.http_server import listening
from serve.api.service import Service
from serve.catalog.catalog import Catalog
from serve.deployment.engine_clients import EngineClients
from serve.errors import KINDS, RequestError
from serve.metrics import Metrics
from serve.settings import ServeArgs

logger = logging.getLogger(__name__)

BRANCHES = {"str", "int", "float", "bool", "list", "dict"}
WRONG_TYPES = {"string_type", "int_type", "float_type", "bool_type", "list_type", "dict_type", "model_type"}
"""pydantic's errors that mean: another branch of the union."""


class Api:
    """A replica of it speaks HTTP. It loads tokenizers but no model."""

    def __init__(
        self,
        args: ServeArgs,
        key_hashes: Sequence[str],
        catalog: Catalog,
        engines: Mapping[str, DeploymentHandle],
        evaluations: DeploymentHandle,
    ) -> None:
        metrics = Metrics()
        clients = EngineClients(engines, catalog, metrics, args.request_timeout_s, args.max_replicas)
        self._service = Service(args, catalog, clients, metrics)
        self._service.load_tokenizers()
        self._keys = Keys(key_hashes) if args.require_key else None
        self._evaluations = evaluations

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return build(self._service, self._keys, self._evaluations)


def build(service: Service, keys: Keys | None, evaluations: DeploymentHandle) -> FastAPI:
    """The application around ``service``; ``keys`` is None when no key is asked for."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        args = service.args
        watching = asyncio.create_task(service.watch_loading())
        async with AsyncExitStack() as open_until_then:
            if args.listen is not None:
                shared = args.api_replicas > 1
                await open_until_then.enter_async_context(listening(app, args.listen, args.route_prefix, shared))
            yield
        watching.cancel()

    app = FastAPI(
        title="bruno-ray",
        version=__version__,
        docs_url=None,  # loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=COMMON,
    )
    app.openapi = partial(_described, app.openapi)
    app.add_middleware(Guard, keys=keys, max_body_bytes=service.args.max_body_bytes, metrics=service.metrics)
    if service.args.cors_origins:  # before the guard: a preflight carries no key
        app.add_middleware(OtherPages, origins=service.args.cors_origins)
    app.add_middleware(Unversioned)  # the outermost: all others see the paths that there are
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _defect)
    app.include_router(chat.router(service))
    app.include_router(completions.router(service))
    app.include_router(evaluation_routes.router(service, evaluations))
    app.include_router(models.router(service))
    if service.args.pages:
        from serve.pages import chat as chat_page
        from serve.pages import study as study_pages

        chat_page.mount(app, auth_required=keys is not None)
        runs = {name: run.path for name, run in service.catalog.runs.items()}
        study_pages.mount(app, runs, keys.accept if keys is not None else None)
    return app


def _described(generate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """FastAPI's OpenAPI without the 422 that it adds everywhere: ours is 400."""
    schema = generate()  # the same dictionary each time
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema


# ----- errors -----


def _response(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _request_error(request: Request, error: Any) -> JSONResponse:
    return _response(error)


async def _validation_error(request: Request, error: Any) -> JSONResponse:
    """The first thing that is wrong with the request. What was sent is not repeated: it may be long, or a secret."""
    found = error.errors()
    found = [e for e in found if e["loc"][:2] == found[0]["loc"][:2]]
    # Of a union each branch has an error. Meant is the one that got furthest, and of those one of the right type.
    first = max(found, key=lambda e: (len(_path(e["loc"])), e["type"] not in WRONG_TYPES))
    cause = first.get("ctx", {}).get("error")
    path = _path(first["loc"])
    if isinstance(cause, Unsupported):
        path.append(cause.name)
    param = ".".join(path) or None
    if first["type"] == "json_invalid":
        return _response(RequestError(400, "The body is not valid JSON.", code="invalid_json"))
    if param is None and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        text = "The body must be a JSON object, with the header Content-Type: application/json."
        return _response(RequestError(400, text, code="invalid_json"))
    if first["type"] == "extra_forbidden":
        return _response(RequestError(400, f"Unknown field {param!r}.", param, "unknown_parameter"))
    if first["type"] == "missing":
        return _response(RequestError(400, f"{param!r} is missing.", param, "missing_parameter"))
    reason = str(cause) if cause is not None else _reason(first, found)
    return _response(RequestError(400, f"{param}: {reason}." if param else f"{reason}.", param))


def _reason(first: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """pydantic's, but for lengths, and with every type that would do."""
    bounds = first.get("ctx", {})
    things = "entries" if bounds.get("field_type") in ("List", "Dictionary") else "characters"
    length = "" if bounds.get("actual_length") is None else f", not {bounds['actual_length']}"
    if first["type"] == "too_short":
        return f"the number of {things} must be at least {bounds['min_length']}{length}"
    if first["type"] == "too_long":
        return f"the number of {things} must be at most {bounds['max_length']}{length}"
    if first["type"] in WRONG_TYPES:
        place = _path(first["loc"])
        types = [e["msg"] for e in found if _path(e["loc"]) == place and e["type"] in WRONG_TYPES]
        first_type, *others = dict.fromkeys(types)
        return ", or ".join([first_type, *(text.removeprefix("Input should be ") for text in others)])
    return first["msg"]


def _path(location: Sequence[str | int]) -> list[str]:
    """Names of fields and positions; the other parts are pydantic's names for the branches of a union."""
    names = [part for part in location[1:] if isinstance(part, int) or (part.isidentifier() and part not in BRANCHES)]
    return [str(part) for part in names]


async def _http_error(request: Request, error: Any) -> JSONResponse:
    status = error.status_code if error.status_code in KINDS else 400
    text = str(error.detail)
    if status == 404:
        text = f"There is no {request.method} {request.url.path}."
    elif status == 405:
        text = f"{request.url.path} does not take {request.method}."
    return _response(RequestError(status, text, headers=dict(error.headers or {})))


async def _defect(request: Request, error: Any) -> JSONResponse:
    """Starlette logs the traceback."""
    return _response(RequestError(500, "The server failed. This is a defect; its log has the reason."))
