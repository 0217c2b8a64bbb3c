"""Scoring a served model on prompts, as background jobs in a process of their own.

The figures are those of ``bruno-ray evaluate``: greedy answers looked through for markers, and the KL divergence of the
next token from the base model's, by the same functions on the same token ids.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from bruno_ray.errors import BrunoError
from bruno_ray.intervals import wilson_interval
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt, load_prompts
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.scoring.markers import Markers
from bruno_ray.settings import ScoringSettings, Settings
from serve.api.rendering import Renderer
from serve.api.requests import EvaluationRequest
from serve.catalog.catalog import Catalog, ServedModel
from serve.deployment.engine_clients import EngineClients
from serve.deployment.replica import Refusal
from serve.engine.types import Event, GenerationRequest
from serve.errors import RequestError
from serve.metrics import Metrics
from serve.settings import ServeArgs

logger = logging.getLogger(__name__)

CONCURRENT_ANSWERS = 16
"""Of one job: people who chat go on being answered."""

KL_CHUNK = 16
"""Prompts whose distributions are in memory at a time."""

JOBS_KEPT = 200


@dataclass
class Job:
    id: str
    request: EvaluationRequest
    created: int
    status: str = "queued"
    done: int = 0
    total: int = 0
    result: dict[str, Any] | None = None
    error: str | None = None
    task: asyncio.Task | None = field(default=None, repr=False)

    def view(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "evaluation",
            "created": self.created,
            "model": self.request.model,
            "status": self.status,
            "progress": {"done": self.done, "total": self.total},
            "result": self.result,
            "error": self.error,
        }


@dataclass(frozen=True)
class Plan:
    """What one job does, with every default filled in."""

    model: ServedModel
    target: tuple[Prompt, ...]
    baseline: tuple[Prompt, ...]
    scoring: ScoringSettings
    base: str | None
    """Engine with the base model; None if that is not served."""

    own_prompts: bool
    """Whether both sides are the run's own test prompts."""


class Evaluations:
    """The jobs. One replica, so that every API process sees the same ones."""

    def __init__(self, args: ServeArgs, catalog: Catalog, engines: Mapping[str, DeploymentHandle]) -> None:
        self._args = args
        self._catalog = catalog
        self._engines = EngineClients(engines, catalog, Metrics(), args.request_timeout_s, args.max_replicas)
        self._renderers: dict[str, Renderer] = {}
        self._jobs: dict[str, Job] = {}
        self._turn = asyncio.Semaphore(1)

    async def directions(self, run: str, direction_set: str) -> np.ndarray:
        """(n_layers + 1, rank, d_model) float32, for a replica that does not know an edit yet."""
        return await asyncio.to_thread(self._catalog.runs[run].directions, direction_set)

    # ----- what is asked of it; answers are views of jobs -----

    async def create(self, request: EvaluationRequest) -> dict[str, Any] | Refusal:
        """Start a job. A Refusal for an unknown model, or where there is nothing to score with."""
        try:
            plan = await asyncio.to_thread(self._plan, request)
        except RequestError as error:
            return Refusal(error.status, str(error), error.code)
        except BrunoError as error:
            return Refusal(400, str(error))
        job = Job(f"eval-{uuid.uuid4().hex[:16]}", request, int(time.time()))
        job.total = len(plan.target) + len(plan.baseline)
        self._jobs[job.id] = job
        self._forget()
        job.task = asyncio.create_task(self._run(job, plan))
        return job.view()

    def listed(self) -> list[dict[str, Any]]:
        return [job.view() for job in reversed(self._jobs.values())]

    def get(self, job_id: str) -> dict[str, Any] | Refusal:
        return self._jobs[job_id].view() if job_id in self._jobs else _unknown(job_id)

    async def cancel(self, job_id: str) -> dict[str, Any] | Refusal:
        """Nothing happens to a job that has ended."""
        job = self._jobs.get(job_id)
        if job is None or job.task is None:
            return _unknown(job_id)
        job.task.cancel()
        await asyncio.wait([job.task])
        return job.view()

    def _forget(self) -> None:
        ended = [job for job in self._jobs.values() if job.task is not None and job.task.done()]
        for job in ended[: max(0, len(self._jobs) - JOBS_KEPT)]:
            del self._jobs[job.id]

    # ----- the work -----

    def _plan(self, request: EvaluationRequest) -> Plan:
        self._catalog.refresh()
        model = self._catalog.resolve(request.model)
        settings = RunDirectory(model.run).read().settings if model.run is not None else None
        if settings is None and (request.target is None or request.baseline is None or request.markers is None):
            raise RequestError(400, f"{model.id} is of no run: give target, baseline and markers", "target")
        own = load_prompts(settings) if settings and (request.target is None or request.baseline is None) else None
        given = {"target": request.target, "baseline": request.baseline}
        sides = {
            side: tuple(Prompt(text, model.system_prompt) for text in texts)
            if texts is not None
            else getattr(own, side).test
            for side, texts in given.items()
        }
        scoring = settings.scoring.for_report() if settings is not None else ScoringSettings()
        changes: dict[str, Any] = {}
        if request.markers is not None:
            changes["markers"] = tuple(request.markers)
        if request.max_tokens is not None:
            changes["response_tokens"] = request.max_tokens
        scoring = scoring.model_copy(update=changes)
        Markers(scoring.markers)  # raises SettingsError if there are none
        if model.base not in self._renderers:
            self._renderers[model.base] = Renderer(self._catalog.engines[model.base].settings)
        own_prompts = request.target is None and request.baseline is None
        return Plan(model, **sides, scoring=scoring, base=self._base(model, settings), own_prompts=own_prompts)

    def _base(self, model: ServedModel, settings: Settings | None) -> str | None:
        if model.kind != "saved":
            return model.base
        return next((e.key for e in self._catalog.engines.values() if settings and e.settings == settings.model), None)

    async def _run(self, job: Job, plan: Plan) -> None:
        try:
            async with self._turn:
                job.status = "running"
                job.result = await self._evaluate(job, plan)
            job.status = "done"
        except asyncio.CancelledError:
            job.status = "cancelled"
        except BrunoError as error:
            job.status, job.error = "failed", str(error)
        except Exception:
            logger.exception("evaluation %s failed", job.id)
            job.status, job.error = "failed", "The server failed. This is a defect; its log has the reason."

    async def _evaluate(self, job: Job, plan: Plan) -> dict[str, Any]:
        n_samples = job.request.samples or 0
        quoted = plan.baseline[:n_samples]
        job.total = len(plan.target) + len(quoted) + (len(plan.baseline) if plan.base else 0)
        target = self._ids(plan, plan.target)
        baseline = self._ids(plan, plan.baseline)
        markers = Markers(plan.scoring.markers, plan.scoring.empty_counts)
        answers = await self._answers(job, plan.model, target, plan.scoring.response_tokens)
        shows = [markers.shown_by(answer.text) for answer in answers]
        on_baseline = await self._answers(job, plan.model, baseline[: len(quoted)], plan.scoring.response_tokens)
        kl = await self._kl(job, plan, baseline) if plan.base else None
        low, high = wilson_interval(sum(shows), len(shows))
        samples = [
            {"side": "target", "prompt": prompt.user, "answer": answer.text, "shows": shown}
            for prompt, answer, shown in list(zip(plan.target, answers, shows))[:n_samples]
        ] + [
            {"side": "baseline", "prompt": prompt.user, "answer": answer.text, "shows": None}
            for prompt, answer in zip(quoted, on_baseline)
        ]
        return {
            "prompts": "test prompts of the run" if plan.own_prompts else "given",
            "markers": list(plan.scoring.markers),
            "max_tokens": plan.scoring.response_tokens,
            "behaviour": {
                "rate": sum(shows) / len(shows),
                "count": sum(shows),
                "total": len(shows),
                "interval": [low, high],
            },
            "kl": kl,
            "samples": samples,
        }

    def _ids(self, plan: Plan, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        tokenizer = self._renderers[plan.model.base].tokenizer
        return [tuple(ids) for ids in render(tokenizer, prompts, plan.model.response_prefix, date=plan.model.date)]

    async def _answers(
        self, job: Job, model: ServedModel, prompts: Sequence[tuple[int, ...]], max_tokens: int
    ) -> list[Event]:
        """Greedy answers, in order."""
        places = asyncio.Semaphore(CONCURRENT_ANSWERS)

        async def answer(ids: tuple[int, ...]) -> Event:
            request = GenerationRequest(ids, model.edit_key, max_tokens, temperature=0.0)
            async with places:
                while True:
                    try:
                        async with aclosing(self._engines.events(model, request, whole=True)) as events:
                            event = [event async for event in events][-1]
                    except RequestError as error:
                        if error.status != 429:
                            raise
                        await asyncio.sleep(float(error.headers.get("Retry-After", 1)))
                    else:
                        job.done += 1
                        return event

        tasks = [asyncio.create_task(answer(ids)) for ids in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _kl(self, job: Job, plan: Plan, prompts: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        """Mean, median and 95th percentile over the first answer tokens, and the mean of the very first ones."""
        n_positions = plan.scoring.kl_tokens
        continued = [[ids] for ids in prompts]
        if n_positions > 1:  # teacher-forced on the base model's greedy answer
            base = ServedModel(plan.base or "", "base", plan.base or "")
            for ids, answer in zip(continued, await self._answers(Job("", job.request, 0), base, prompts, n_positions)):
                # The token that ends an answer is among them: where it ends is a position as well.
                ids += [ids[0] + answer.token_ids[:i] for i in range(1, len(answer.token_ids))]
        values_T: list[float] = []
        first_P: list[float] = []
        for start in range(0, len(continued), KL_CHUNK):
            chunk = continued[start : start + KL_CHUNK]
            flat = await self._kl_of(plan, [ids for positions in chunk for ids in positions])
            values_T += flat
            for positions in chunk:
                first_P.append(flat[0])
                flat = flat[len(positions) :]
            job.done += len(chunk)
        return {
            "mean": float(np.mean(values_T)),
            "median": float(np.quantile(values_T, 0.5)),
            "p95": float(np.quantile(values_T, 0.95)),
            "first": float(np.mean(first_P)),
            "prompts": len(first_P),
            "tokens": n_positions,
            "base": plan.base,
        }

    async def _kl_of(self, plan: Plan, prompts: list[tuple[int, ...]]) -> list[float]:
        model, base_PV = plan.model, None
        if plan.base != model.base:
            base_PV = await self._engines.call(str(plan.base), "next_logprobs", prompts, None)
        return await self._engines.call(model.base, "kl", prompts, self._engines.source(model), base_PV)


def _unknown(job_id: str) -> Refusal:
    return Refusal(404, f"There is no evaluation {job_id!r}; GET /v1/evaluations lists them.", "not_found")
