"""Several answers to one request at a time, and how all of them are sent."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.api.requests import SEED_RANGE, Generation
from serve.catalog.catalog import ServedModel
from serve.deployment.engine_clients import EngineClients
from serve.engine.shaping import Penalties
from serve.engine.types import Event, GenerationRequest
from serve.errors import RequestError

logger = logging.getLogger(__name__)

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Choice:
    """One answer that is asked for."""

    index: int
    prompt: int
    """Which of the request's prompts it answers."""

    request: GenerationRequest


def choices_of(
    prompts: Sequence[tuple[int, ...]], asked: Generation, edit_key: str | None, **fields: Any
) -> list[Choice]:
    """n answers to each prompt, prompt by prompt, choice i seeded with seed + i."""
    n = asked.n or 1
    penalties = _penalties(asked)
    greedy = asked.top_p == 0  # no token but the likeliest is in the nucleus
    choices = []
    for i in range(n * len(prompts)):
        seed = None if asked.seed is None else (asked.seed + i % n) % SEED_RANGE
        request = GenerationRequest(
            prompt_ids=prompts[i // n],
            edit=edit_key,
            temperature=0.0 if greedy else float(asked.temperature or 0.0),
            top_p=1.0 if greedy else float(asked.top_p or 1.0),
            seed=seed,
            stop=asked.stops,
            ignore_eos=bool(asked.ignore_eos),
            top_k=max(0, asked.top_k or 0),
            min_p=float(asked.min_p or 0.0),
            penalties=penalties,
            **fields,
        )
        choices.append(Choice(i, i // n, request))
    return choices


def _penalties(asked: Generation) -> Penalties | None:
    """None if they would change nothing."""
    found = Penalties(
        repetition=float(asked.repetition_penalty or 1.0),
        presence=float(asked.presence_penalty or 0.0),
        frequency=float(asked.frequency_penalty or 0.0),
        bias=tuple((int(token_id), float(bias)) for token_id, bias in (asked.logit_bias or {}).items() if bias),
    )
    return None if found == Penalties() else found


async def gathered(engines: EngineClients, model: ServedModel, choices: Sequence[Choice]) -> list[Event]:
    """Every answer as one event, in order. The first error ends all of them."""

    async def whole(choice: Choice) -> Event:
        async with aclosing(engines.events(model, choice.request, whole=True)) as events:
            return [event async for event in events][-1]

    if len(choices) == 1:
        return [await whole(choices[0])]
    tasks = [asyncio.create_task(whole(choice)) for choice in choices]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _end(tasks)


async def merged(
    engines: EngineClients, model: ServedModel, choices: Sequence[Choice]
) -> AsyncIterator[tuple[Choice, Event]]:
    """Events of all answers as they come. Closing it cancels what is not finished."""
    if len(choices) == 1:
        async with aclosing(engines.events(model, choices[0].request, whole=False)) as events:
            async for event in events:
                yield choices[0], event
        return
    queue: asyncio.Queue[tuple[Choice, Event | BaseException]] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(engines.events(model, choice.request, whole=False)) as events:
                async for event in events:
                    queue.put_nowait((choice, event))
        except Exception as error:  # raised again where it is read
            queue.put_nowait((choice, error))

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    unfinished = len(tasks)
    try:
        while unfinished:
            choice, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            unfinished -= event.finish_reason is not None
            yield choice, event
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ----- server-sent events -----


def sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def streamed(chunks: AsyncIterator[bytes]) -> Response:
    """The response of which ``chunks`` is the body. An error before the first of them has a status of its own; a
    later one is an event of the stream. RequestError passes through in the first case."""
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()  # type: ignore[attr-defined]
        raise

    async def body() -> AsyncIterator[bytes]:
        async with aclosing(chunks) as rest:  # type: ignore[type-var]
            try:
                yield first
                async for chunk in rest:
                    yield chunk
            except RequestError as error:
                yield sse(error.body)
            except Exception:
                logger.exception("a stream failed")
                yield sse(RequestError(500, "The server failed. Send the request again.").body)
            yield b"data: [DONE]\n\n"

    return StreamingResponse(body(), media_type="text/event-stream", headers=SSE_HEADERS)


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(data, status, headers)


def usage_of(choices: Sequence[Choice], totals: dict[int, Event]) -> dict[str, int]:
    """Every prompt counted once, however many answers it has. ``totals``: the last event by index of choice."""
    by_prompt = {choice.prompt: len(choice.request.prompt_ids) for choice in choices}
    n_prompt, n_completion = sum(by_prompt.values()), sum(event.n_completion for event in totals.values())
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}
