"""POST /v1/completions: the model goes on with a text or with token ids, and says how likely each token was."""

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from serve.api.choices import Choice, choices_of, gathered, json_response, merged, sse, streamed, usage_of
from serve.api.documented import GENERATES
from serve.api.rendering import Renderer
from serve.api.requests import CompletionRequest
from serve.api.responses import Completion
from serve.api.service import Service
from serve.catalog.catalog import ServedModel
from serve.engine.sampling import TokenLogprob
from serve.engine.types import Event
from serve.errors import RequestError


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["completions"])

    @routes.post("/v1/completions", response_model=Completion, responses=GENERATES)
    async def create_completion(request: CompletionRequest) -> Response:
        """What comes after each prompt; with `stream`, as server-sent events."""
        model = await service.model(request.model)
        renderer = service.renderers[model.base]
        prompts = []
        for prompt in request.prompts:
            ids = await renderer.encode(prompt, bool(request.add_special_tokens)) if isinstance(prompt, str) else prompt
            if not ids:
                raise RequestError(400, "A prompt is empty: send at least one token.", "prompt")
            prompts.append(tuple(ids))
        shown = [renderer.decode(ids) if request.echo and not isinstance(prompt, str) else prompt
                 for prompt, ids in zip(request.prompts, prompts)]  # fmt: skip
        choices = choices_of(
            prompts,
            request,
            model.edit_key,
            max_tokens=service.args.default_max_tokens if request.max_tokens is None else request.max_tokens,
            top_logprobs=request.logprobs,
            prompt_logprobs=bool(request.echo) and request.logprobs is not None,
        )
        answers = _Answers(renderer, request, [str(shown[c.prompt]) if request.echo else "" for c in choices])
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        if request.stream:
            return await streamed(_chunks(service, model, request, choices, answers, head))
        with service.admitted(request, len(prompts)):
            if request.max_tokens == 0 and request.logprobs is None:  # only an echo
                events = [Event(finish_reason="length", n_prompt=len(c.request.prompt_ids)) for c in choices]
            else:
                events = await gathered(service.engines, model, choices)
        entries = [answers.entry(choice, event) for choice, event in zip(choices, events)]
        return json_response({**head, "choices": entries, "usage": usage_of(choices, dict(enumerate(events)))})

    return routes


class _Answers:
    """What has been said of each choice so far, for the places of the tokens in the text."""

    def __init__(self, renderer: Renderer, request: CompletionRequest, echoes: list[str]) -> None:
        self._renderer = renderer
        self._request = request
        self._echoes = dict(enumerate(echoes))
        self._offsets = [0] * len(echoes)

    def entry(self, choice: Choice, event: Event) -> dict[str, Any]:
        """One entry of ``choices``: all of the answer, or what is new of it."""
        text = self._echoes.pop(choice.index, "") + event.text
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = self._logprobs(choice.index, (*event.prompt_logprobs, *event.logprobs))
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": event.finish_reason}

    def _logprobs(self, index: int, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token = self._renderer.token_text(entry.token_id)
            result["tokens"].append(token)
            result["token_logprobs"].append(_finite(entry.logprob))
            result["top_logprobs"].append(self._top(entry))
            result["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(token)
        return result

    def _top(self, entry: TokenLogprob) -> dict[str, float | None] | None:
        """The alternatives and the token itself by their text; of several with one text the likeliest."""
        if entry.logprob is None:
            return None
        top: dict[str, float | None] = {}
        for token_id, logprob in sorted((*entry.top, (entry.token_id, entry.logprob)), key=lambda pair: -pair[1]):
            top.setdefault(self._renderer.token_text(token_id), _finite(logprob))
        return top


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity."""
    return None if logprob is None else max(logprob, -9999.0)


async def _chunks(
    service: Service,
    model: ServedModel,
    request: CompletionRequest,
    choices: list[Choice],
    answers: _Answers,
    head: dict[str, Any],
) -> AsyncIterator[bytes]:
    if request.include_usage:
        head = {**head, "usage": None}
    last: dict[int, Event] = {}
    with service.admitted(request, len({choice.prompt for choice in choices})):
        if request.max_tokens == 0 and request.logprobs is None:
            for choice in choices:
                last[choice.index] = Event(finish_reason="length")
                yield sse({**head, "choices": [answers.entry(choice, last[choice.index])]})
        else:
            async with aclosing(merged(service.engines, model, choices)) as events:
                async for choice, event in events:
                    last[choice.index] = event
                    entry = answers.entry(choice, event)
                    if entry["text"] or event.finish_reason or (entry["logprobs"] and entry["logprobs"]["tokens"]):
                        yield sse({**head, "choices": [entry]})
    if request.include_usage:
        yield sse({**head, "choices": [], "usage": usage_of(choices, last)})
