"""What every route works with: the catalog, the tokenizers, the engines, the limits."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bruno_ray.errors import BrunoError
from serve.api.rendering import Renderer
from serve.api.requests import Generation
from serve.catalog.catalog import Catalog, Problem, ServedModel
from serve.deployment.engine_clients import EngineClients
from serve.errors import RequestError
from serve.metrics import Metrics
from serve.settings import ServeArgs

logger = logging.getLogger(__name__)


@dataclass
class Service:
    """One per API process."""

    args: ServeArgs
    catalog: Catalog
    engines: EngineClients
    metrics: Metrics
    renderers: dict[str, Renderer] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    """Engine -> why it cannot serve."""

    n_requests: int = 0

    def load_tokenizers(self) -> None:
        """One per engine; an engine without is broken."""
        for key, engine in self.catalog.engines.items():
            try:
                self.renderers[key] = Renderer(engine.settings)
            except BrunoError as error:
                self.broken[key] = str(error)
                logger.error("%s", error)

    async def watch_loading(self) -> None:
        """Find out which models can be loaded, as soon as each engine answers."""

        async def watch(key: str) -> None:
            while True:
                try:
                    problem = await self.engines.problem(key, None)
                except RequestError:  # it died while it was being loaded, and is loaded again
                    await asyncio.sleep(1)
                    continue
                if problem:
                    self.broken[key] = problem
                return

        await asyncio.gather(*(watch(key) for key in self.catalog.engines))

    async def models(self) -> list[ServedModel | Problem]:
        """Everything that is listed, what is broken included."""
        await asyncio.to_thread(self.catalog.refresh)
        listed: list[ServedModel | Problem] = list(self.catalog.entries)
        return listed + self.catalog.problems

    async def model(self, model_id: str, also_broken: bool = False) -> ServedModel:
        """Raises UnknownModel (404), or RequestError (503) for a model that could not be loaded."""
        try:
            model = self.catalog.resolve(model_id)
        except RequestError:
            await asyncio.to_thread(self.catalog.refresh)  # a trial that has just been finished
            model = self.catalog.resolve(model_id)
        if not also_broken and (reason := self.broken.get(model.base)):
            raise RequestError(503, f"The model {model_id!r} cannot be served: {reason}", "model", "unavailable")
        return model

    @contextmanager
    def admitted(self, request: Generation, n_prompts: int) -> Iterator[None]:
        """A place among the generating requests. Raises RequestError (400, 429)."""
        n_answers = (request.n or 1) * n_prompts
        if n_answers > self.args.max_answers:
            raise RequestError(
                400, f"That would be {n_answers} answers; one request may ask for {self.args.max_answers}.", "n"
            )
        if self.n_requests >= self.args.max_requests:
            raise RequestError(429, "The server is busy: try again in a second.", code="overloaded", retry_after=1)
        self.n_requests += 1
        self.metrics.in_flight.set(self.n_requests)
        try:
            yield
        finally:
            self.n_requests -= 1
            self.metrics.in_flight.set(self.n_requests)
