"""What is served and how it is doing: answered in the API's process, never behind generation."""

import asyncio
import resource
import time
from typing import Any

import psutil
from fastapi import APIRouter
from starlette.responses import Response

from bruno_ray.study.tables import describe_edit
from serve.api.choices import json_response
from serve.api.documented import BODY, NOT_FOUND, UNAVAILABLE
from serve.api.responses import Config, Front, ModelCard, ModelList, Readiness, Stats, Status
from serve.api.service import Service
from serve.catalog.catalog import Problem, ServedModel
from serve.errors import RequestError
from serve.metrics import CONTENT_TYPE

READY_TIMEOUT = 2.0


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models", response_model=ModelList, tags=["models"])
    async def list_models() -> Response:
        """Base models, trials of the Pareto fronts, selected trials, saved models; and what cannot be served.

        Of an edit (`bruno.scalable`) `ID*X` is a model too: the same with every strength multiplied by X.
        """
        return json_response({"object": "list", "data": [_card(service, model) for model in await service.models()]})

    @routes.get("/v1/models/{id:path}", response_model=ModelCard, responses=NOT_FOUND, tags=["models"])
    async def retrieve_model(id: str) -> Response:
        """Also of trials that are not listed."""
        problem = next((problem for problem in service.catalog.problems if problem.id == id), None)
        return json_response(_card(service, problem or await service.model(id, also_broken=True)))

    @routes.get("/health", response_model=Status, tags=["server"])
    async def health() -> Response:
        """Whether this process answers."""
        return json_response({"status": "ok"})

    @routes.get("/ready", response_model=Readiness, responses=UNAVAILABLE, tags=["server"])
    async def ready() -> Response:
        """Whether every model that can be served is."""
        keys = [key for key in service.catalog.engines if key not in service.broken]
        found = dict(zip(keys, await asyncio.gather(*(_is_ready(service, key) for key in keys))))
        if not all(found.values()):
            missing = ", ".join(key for key, is_ready in found.items() if not is_ready)
            raise RequestError(503, f"Not ready yet: {missing}", code="not_ready", retry_after=2)
        return json_response({"status": "ready", "engines": found})

    @routes.get("/metrics", response_class=Response, tags=["server"],
                responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
    async def metrics() -> Response:
        """Counters of this process and figures of the engines, for Prometheus."""
        text = service.metrics.text(await service.engines.stats())
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    @routes.get("/api/stats", response_model=Stats, tags=["page"])
    async def stats() -> Response:
        """Speed, rows and memory of every engine."""
        memory = psutil.Process().memory_info().rss
        api = {
            "memory_bytes": memory,
            "peak_memory_bytes": max(memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
            "requests": service.n_requests,
            "time": int(time.time()),
        }
        return json_response({"engines": await service.engines.stats(), "api": api})

    @routes.get("/api/front", response_model=Front, responses={**BODY, **NOT_FOUND}, tags=["page"])
    async def front(run: str) -> Response:
        """The Pareto front of a run's study as it is now."""
        await asyncio.to_thread(service.catalog.refresh)
        served = service.catalog.runs.get(run)
        if served is None:
            raise RequestError(404, f"There is no run {run!r} here; GET /api/config lists them.", "run")
        rows = [
            {
                "trial": trial.number,
                "values": trial.values,
                "counts": trial.counts,
                "description": describe_edit(trial.edit),
                "model": service.catalog.trial_id(run, trial.number),
            }
            for trial in served.front()
        ]
        return json_response({"run": run, "objectives": list(served.objectives), "rows": rows})

    @routes.get("/api/config", response_model=Config, tags=["page"])
    async def config() -> Response:
        """What the chat page needs to know of the runs."""
        runs = {
            name: {
                "markers": list(run.record.settings.scoring.markers),
                "system_prompt": run.record.settings.prompts.system_prompt,
                "base": service.catalog.base_of(name),
            }
            for name, run in service.catalog.runs.items()
        }
        return json_response({"auth": service.args.require_key, "runs": runs})

    return routes


async def _is_ready(service: Service, engine: str) -> bool:
    try:
        await service.engines.problem(engine, READY_TIMEOUT)
    except (TimeoutError, RequestError):
        return False
    return True


def _card(service: Service, model: ServedModel | Problem) -> dict[str, Any]:
    if isinstance(model, Problem):
        about: dict[str, Any] = {"kind": None, "run": None, "trial": None, "base": None, "metrics": {}}
        about |= {"description": "", "scalable": False, "problem": model.reason}
    else:
        about = {
            "kind": model.kind,
            "run": model.run_name,
            "trial": model.trial,
            "base": None if model.kind in ("base", "saved") else model.base,
            "metrics": model.metrics,
            "description": model.description,
            "scalable": model.edit is not None and model.scale == 1,
            "problem": service.broken.get(model.base),
        }
    created = model.created if isinstance(model, ServedModel) else 0
    return {"id": model.id, "object": "model", "created": created, "owned_by": "bruno-ray", "bruno": about}
