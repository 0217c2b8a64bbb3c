"""The engines as the API sees them: requests go out, events come back, and a replica that dies is replaced by another.

A request whose replica dies before anything of its answer has been passed on is sent again; that is not visible to the
client. Afterwards it ends with an error.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.catalog.catalog import Catalog, ServedModel
from serve.deployment.event_channel import STRAGGLERS_SECONDS, Ended, EventReceiver, everything_in, pumped
from serve.deployment.replica import EditSource, Refusal
from serve.engine.types import Event, GenerationRequest, joined
from serve.errors import RequestError
from serve.metrics import Metrics

logger = logging.getLogger(__name__)

RESENDS = 2
STATS_TIMEOUT = 2.0
STATS_KEPT = 10.0
"""Seconds after which a replica that has not been heard of is taken for gone."""

SUMMED = (
    *("running", "waiting", "kv_tokens_used", "kv_tokens", "tokens_per_second", "prompt_tokens_per_second"),
    *("memory_bytes", "steps", "tokens", "prompt_tokens", "preemptions"),
)


class EngineClients:
    """The engines that an API process asks, by key."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        catalog: Catalog,
        metrics: Metrics,
        timeout_s: float,
        max_replicas: int,
    ) -> None:
        self._handles = dict(handles)
        self._generate = {key: handle.generate.options(stream=True) for key, handle in handles.items()}
        self._catalog = catalog
        self._metrics = metrics
        self._timeout = timeout_s
        self._probes = 1 if max_replicas == 1 else 2 * max_replicas
        self._receiver = EventReceiver(handles, self._probes)
        self._seen: dict[str, dict[str, tuple[float, dict[str, Any]]]] = {key: {} for key in handles}

    def source(self, model: ServedModel) -> EditSource | None:
        """What a replica needs to know of the model's edit."""
        if model.edit is None or model.edit_key is None:
            return None
        return EditSource(model.edit_key, model.edit, str(model.run_name))

    async def events(self, model: ServedModel, request: GenerationRequest, whole: bool) -> AsyncIterator[Event]:
        """The answer in pieces, or as one event. Raises RequestError; closing it cancels the answer."""
        source = self.source(model)
        started = time.monotonic()
        last = None
        n_sent = 0
        sent = self._with_resends(model, request, source, whole, started + self._timeout)
        async with aclosing(sent) as events:
            async for event in events:
                now = time.monotonic()
                if event.finish_reason == "error":
                    raise RequestError(503, f"The answer could not be finished: {event.error}", retry_after=1)
                if not whole and event.n_completion > n_sent:
                    if last is None:
                        self._metrics.first_token(model.id, now - started)
                    else:
                        self._metrics.next_tokens(model.id, now - last, event.n_completion - n_sent)
                    last, n_sent = now, event.n_completion
                if event.finish_reason is not None:
                    self._metrics.answer(model.id, event.n_prompt, event.n_completion, now - started)
                yield event

    async def _with_resends(
        self, model: ServedModel, request: GenerationRequest, source: EditSource | None, whole: bool, deadline: float
    ) -> AsyncIterator[Event]:
        for resend in range(RESENDS + 1):
            passed_on, finished = False, False
            call = None
            try:
                with self._receiver.stream(None if whole else model.base) as (stream, queue):
                    call = self._generate[model.base].remote(request, source, stream)
                    with pumped(call, queue):
                        async with aclosing(_from(queue, deadline)) as events:
                            async for event in events:
                                passed_on, finished = True, event.finish_reason is not None
                                yield event
                if finished:
                    return
                raise RequestError(503, "The answer ended half-way. Send the request again.", retry_after=1)
            except (asyncio.TimeoutError, TimeoutError):
                raise RequestError(
                    408, f"The answer was not finished within {self._timeout:g} s: ask for less.", code="timeout"
                ) from None
            except BackPressureError:
                raise RequestError(
                    429, "The server is busy: try again in a second.", code="overloaded", retry_after=1
                ) from None
            except (RayActorError, DeploymentUnavailableError) as error:
                logger.warning("a replica of %s died: %s", model.base, " ".join(str(error).split())[:200])
                if passed_on or resend == RESENDS:
                    raise RequestError(
                        503, "The model's process ended before the answer was finished. Send it again.", retry_after=5
                    ) from None
                self._metrics.resends.inc()
            except (RayError, RayServeException) as error:
                logger.exception("a request to %s failed", model.base)
                raise RequestError(503, "The model's process failed. Send the request again.", retry_after=5) from error
            finally:
                if call is not None and not finished:
                    call.cancel()

    async def call(self, engine: str, method: str, *arguments: Any) -> Any:
        """Another method of any replica, again if that dies. Raises RequestError, also for a Refusal."""
        for resend in range(RESENDS + 1):
            try:
                answer = await getattr(self._handles[engine], method).remote(*arguments)
            except RayActorError:
                if resend == RESENDS:
                    raise RequestError(503, "The model's process ended. Send it again.", retry_after=5) from None
            else:
                if isinstance(answer, Refusal):
                    raise answer.error()
                return answer
        raise AssertionError  # the last round returns or raises

    async def problem(self, engine: str, timeout: float | None) -> str | None:
        """Why the model cannot be served; waits until a replica is up. Raises TimeoutError, or RequestError (503)."""
        response = self._handles[engine].problem.remote()
        try:
            return await asyncio.wait_for(_answer(response), timeout)
        except asyncio.TimeoutError:
            raise TimeoutError from None
        except (RayError, RayServeException):
            raise RequestError(503, "The model's process ended and is being replaced.", retry_after=5) from None

    async def stats(self) -> dict[str, dict[str, Any]]:
        """Per engine: sums over its replicas, the largest context, and the number of replicas heard of."""
        keys = [key for key in self._handles for _ in range(self._probes)]
        found = await asyncio.gather(*(self._one_stats(key) for key in keys))
        now = time.monotonic()
        for key, stats in zip(keys, found):
            if stats is not None:
                self._seen[key][stats["replica"]] = (now, stats)
        result = {}
        for key, seen in self._seen.items():
            for replica in [replica for replica, (when, _) in seen.items() if now - when > STATS_KEPT]:
                del seen[replica]
            result[key] = summed([stats for _, stats in seen.values()])
        return result

    async def _one_stats(self, engine: str) -> dict[str, Any] | None:
        try:
            return await asyncio.wait_for(_answer(self._handles[engine].stats.remote()), STATS_TIMEOUT)
        except (asyncio.TimeoutError, RayError, RayServeException):
            return None


async def _from(queue: asyncio.Queue, deadline: float) -> AsyncIterator[Event]:
    """Events of one answer up to the last, what has come meanwhile as one. Raises what else the queue holds."""
    ended = False
    while True:
        try:
            first = queue.get_nowait()
        except asyncio.QueueEmpty:
            seconds = max(0.0, deadline - time.monotonic())
            try:
                first = await asyncio.wait_for(queue.get(), min(seconds, STRAGGLERS_SECONDS) if ended else seconds)
            except asyncio.TimeoutError:
                if ended:
                    return
                raise
        events: list[Event] = []
        problem: Exception | None = None
        for item in everything_in(queue, first):
            if isinstance(item, Event):
                events.append(item)
            elif isinstance(item, Ended):
                ended = True
            else:
                problem = item.error() if isinstance(item, Refusal) else item
                break
        if events:
            yield (event := joined(events))
            if event.finish_reason is not None:
                return
        if problem is not None:
            raise problem


async def _answer(response: Any) -> Any:
    return await response


def summed(replicas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {name: sum(stats.get(name, 0) for stats in replicas) for name in SUMMED}
    total["max_context"] = max((stats.get("max_context", 0) for stats in replicas), default=0)
    total["replicas"] = len(replicas)
    return total
