"""/v1/evaluations: jobs that score a served model."""

from typing import Any

from fastapi import APIRouter
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response

from serve.api.choices import json_response
from serve.api.documented import BODY, NOT_FOUND, UNAVAILABLE
from serve.api.requests import EvaluationRequest
from serve.api.responses import Evaluation, EvaluationList
from serve.api.service import Service
from serve.deployment.replica import Refusal
from serve.errors import RequestError


def router(service: Service, evaluations: DeploymentHandle) -> APIRouter:
    routes = APIRouter(prefix="/v1/evaluations", tags=["evaluations"])

    async def ask(method: str, *arguments: Any) -> Any:
        try:
            answer = await getattr(evaluations, method).remote(*arguments)
        except (RayError, RayServeException) as error:
            raise RequestError(
                503, "The process that evaluates has ended; its jobs are lost.", retry_after=5
            ) from error
        if isinstance(answer, Refusal):
            raise answer.error()
        return answer

    @routes.post("", response_model=Evaluation, status_code=202, responses={**BODY, **NOT_FOUND, **UNAVAILABLE})
    async def create_evaluation(request: EvaluationRequest) -> Response:
        """Score a model: rate of the behaviour on target prompts, KL divergence from its base on baseline prompts."""
        await service.model(request.model)
        return json_response(await ask("create", request), 202)

    @routes.get("", response_model=EvaluationList, responses=UNAVAILABLE)
    async def list_evaluations() -> Response:
        """The newest first."""
        return json_response({"object": "list", "data": await ask("listed")})

    @routes.get("/{id}", response_model=Evaluation, responses={**NOT_FOUND, **UNAVAILABLE})
    async def retrieve_evaluation(id: str) -> Response:
        """Its progress, and its result once it is done."""
        return json_response(await ask("get", id))

    @routes.delete("/{id}", response_model=Evaluation, responses={**NOT_FOUND, **UNAVAILABLE})
    async def cancel_evaluation(id: str) -> Response:
        """Stop a job; one that has ended stays as it is."""
        return json_response(await ask("cancel", id))

    return routes
