"""One copy of a base model, as a replica of a Ray Serve deployment: a thin shell around ``ServingEngine``.

What can be expected to go wrong with a request comes back as a ``Refusal``: an exception would cross two processes
with its traceback, and fill the log with it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bruno_ray.errors import BrunoError
from bruno_ray.settings import ModelSettings
from serve.deployment.event_channel import EventChannel, StreamId
from serve.errors import EngineError, InvalidRequest, Overloaded, RequestError, TooLong
from serve.settings import EngineSettings

if TYPE_CHECKING:
    from serve.engine.types import Event, GenerationRequest

logger = logging.getLogger(__name__)

PAUSE_PER_STREAM = 0.004
LONGEST_PAUSE = 0.05
"""Seconds between two messages of a stream, by the number of open streams: what happens meanwhile is one message.
A message to a client costs about a millisecond, which is more than a token of a small model; twenty a second look
like one stream of text. The first and the last piece of an answer do not wait."""

FREE_STREAMS = 2
CATALOGUE = "Evaluations"
"""Name of the deployment that replicas ask for directions: one process, where the runs are."""
FAILED_STEPS = 5
"""In a row, after which the device is believed to be beyond recovery."""

STUCK_SECONDS = 300.0
"""Without a step although there is work."""


@dataclass(frozen=True)
class EditSource:
    """An edit, and where a replica that does not know it yet gets its directions."""

    key: str
    edit: dict[str, Any]
    run: str
    """Name of the run whose directions they are; the catalogue's process has them."""


@dataclass(frozen=True)
class Refusal:
    """Why a request gets no answer."""

    status: int
    message: str
    code: str | None = None
    retry_after: float | None = None
    param: str | None = None
    """Field at fault, as completions call it."""

    def error(self) -> RequestError:
        return RequestError(self.status, self.message, self.param, self.code, self.retry_after)


def refusal_of(error: EngineError) -> Refusal:
    if isinstance(error, Overloaded):
        return Refusal(429, f"The server is busy: {error}.", "overloaded", error.retry_after)
    if isinstance(error, TooLong):
        return Refusal(400, f"The prompt is too long: {error}.", "context_length_exceeded", None, "prompt")
    if isinstance(error, InvalidRequest):
        return Refusal(400, f"{error}.", param=error.param)
    return Refusal(503, f"{error}.", "unavailable", 5.0)


class EngineReplica:
    """Wrapped by ``serve.deployment`` in ``app.py``."""

    def __init__(self, model: ModelSettings, settings: EngineSettings, threads: int) -> None:
        import torch
        from ray import serve

        from bruno_ray.model.loading import load_model
        from serve.engine.engine import ServingEngine

        torch.set_num_threads(threads)
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._n_streams = 0
        self._resolving: dict[str, asyncio.Lock] = {}
        self._channels: dict[str, EventChannel] = {}
        """By the name of the API process."""

        self._catalogue: Any = None

        self._progress = (0, time.monotonic())
        self._engine: ServingEngine | None = None
        self._problem: str | None = None
        try:
            self._engine = ServingEngine(load_model(model), settings)
        except BrunoError as error:  # trying again would not help; the other models are served
            self._problem = f"it cannot be loaded: {' '.join(str(error).split())}"
            logger.error("%s: %s", model.id, self._problem)

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            self._engine.close()

    def problem(self) -> str | None:
        """Why this model cannot be served; None if it can."""
        return self._problem

    def _ready_engine(self):
        if self._engine is None:
            raise EngineError(f"this model cannot be served: {self._problem}")
        return self._engine

    async def _know(self, source: EditSource | None) -> str | None:
        """The key of the edit in the engine, which is told of it first if it does not know it."""
        engine = self._ready_engine()
        if source is None:
            return None
        if not engine.knows(source.key):
            async with self._resolving.setdefault(source.key, asyncio.Lock()):
                if not engine.knows(source.key):
                    directions = await self._directions(source)
                    await asyncio.to_thread(_add_edit, engine, source, directions)
        return source.key

    async def _directions(self, source: EditSource) -> list[np.ndarray]:
        """(n_layers + 1, rank, d_model) float32 for each of ``sets_of`` the edit, copies of this replica's own: an
        object that replicas share is pulled from any machine that has it, and machines need not reach each other
        (docs/cluster.md)."""
        from ray import serve

        from bruno_ray.ablation.edit import sets_of

        if self._catalogue is None:
            self._catalogue = serve.get_deployment_handle(CATALOGUE, serve.get_replica_context().app_name)
        return [await self._catalogue.directions.remote(source.run, name) for name in sets_of(source.edit)]

    async def generate(
        self, request: "GenerationRequest", source: EditSource | None, stream: StreamId | None
    ) -> "AsyncIterator[Event | Refusal]":
        """Events of one answer; without a stream, a single one with all of it. ``request.edit`` is that of ``source``.

        With a stream, they go through the channel to the API process that asks, if it has one here.
        """
        from serve.engine.types import joined

        self._n_streams += 1
        try:
            await self._know(source)
            async with aclosing(self._ready_engine().generate(request)) as events:
                if stream is None:
                    yield joined([event async for event in events])
                    return
                channel = self._channels.get(stream.api)
                first = True
                async for event in events:
                    if channel is None:
                        yield event
                        if event.finish_reason is None:
                            await asyncio.sleep(self._pause())
                    elif channel.closed:
                        raise EngineError("the connection within the server was lost: send the request again")
                    else:
                        channel.put(stream, event, urgent=first or event.finish_reason is not None)
                    first = False
        except EngineError as error:
            yield refusal_of(error)
        finally:
            self._n_streams -= 1

    async def open_channel(self, api: str) -> "AsyncIterator[list[tuple[int, Event]]]":
        """Events of all answers to the API process of that name, with the numbers of their streams; never ends."""
        channel = EventChannel()
        self._channels[api] = channel
        try:
            while True:
                yield await channel.batch()
                await channel.pause(self._pause())
        finally:
            channel.closed = True
            if self._channels.get(api) is channel:
                del self._channels[api]

    def _pause(self) -> float:
        return min(PAUSE_PER_STREAM * self._n_streams, LONGEST_PAUSE) if self._n_streams > FREE_STREAMS else 0.0

    async def next_logprobs(
        self, prompts: Sequence[Sequence[int]], source: EditSource | None
    ) -> "np.ndarray | Refusal":
        """(P, V) float32."""
        try:
            key = await self._know(source)
            return (await self._ready_engine().next_logprobs(prompts, [key]))[0]
        except EngineError as error:
            return refusal_of(error)

    async def kl(
        self, prompts: Sequence[Sequence[int]], source: EditSource | None, base_PV: np.ndarray | None
    ) -> list[float] | Refusal:
        """KL(base || this model under the edit) in nats at the token after each prompt.

        ``base_PV`` has the base model's log-probabilities where that is another engine's model.
        """
        try:
            key = await self._know(source)
            engine = self._ready_engine()
            if base_PV is None:
                logprobs_KPV = await engine.next_logprobs(prompts, [None, key])
                base_PV, edited_PV = logprobs_KPV[0], logprobs_KPV[1]
            else:
                edited_PV = (await engine.next_logprobs(prompts, [key]))[0]
        except EngineError as error:
            return refusal_of(error)
        if base_PV.shape != edited_PV.shape:
            return Refusal(400, "This model and its base have different vocabularies: they cannot be compared.")
        return await asyncio.to_thread(_kl, base_PV, edited_PV)

    async def stats(self) -> dict[str, Any]:
        """``EngineStats`` and the replica's name."""
        return {"replica": self._replica, **(asdict(self._engine.stats()) if self._engine else {})}

    def check_health(self) -> None:
        """Called by Serve every few seconds; raising makes it replace this replica."""
        if self._engine is None:
            return
        stats = self._engine.stats()
        if stats.failed_steps >= FAILED_STEPS:
            raise RuntimeError(f"the last {stats.failed_steps} steps failed")
        steps, since = self._progress
        if stats.steps != steps or not (stats.running or stats.waiting):
            self._progress = (stats.steps, time.monotonic())
        elif time.monotonic() - since > STUCK_SECONDS:
            raise RuntimeError(f"no step in {STUCK_SECONDS:.0f} s although there is work")


def _add_edit(engine: Any, source: EditSource, directions: Sequence[np.ndarray]) -> None:
    import torch

    from bruno_ray.ablation.edit import Edit, sets_of

    bank = {name: torch.from_numpy(np.array(each)) for name, each in zip(sets_of(source.edit), directions)}
    engine.add_edit(source.key, Edit.from_dict(source.edit), bank)


def _kl(base_PV: np.ndarray, edited_PV: np.ndarray) -> list[float]:
    import torch

    from bruno_ray.scoring.kl_divergence import kl_of_logits

    rows = zip(torch.from_numpy(base_PV.copy()), torch.from_numpy(edited_PV.copy()))
    return [float(kl_of_logits(base_V, edited_V)) for base_V, edited_V in rows]
