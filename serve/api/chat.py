"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from serve.api.choices import Choice, choices_of, gathered, json_response, merged, sse, streamed, usage_of
from serve.api.documented import GENERATES
from serve.api.formats import grammar_of
from serve.api.rendering import Renderer
from serve.api.requests import ChatRequest
from serve.api.responses import ChatCompletion
from serve.api.service import Service
from serve.api.tool_calls import AnswerReader
from serve.catalog.catalog import ServedModel
from serve.engine.sampling import TokenLogprob
from serve.engine.types import Event
from serve.errors import RequestError


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["chat"])

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, responses=GENERATES)
    async def create_chat_completion(request: ChatRequest) -> Response:
        """An answer to a conversation; with `stream`, as server-sent events."""
        model = await service.model(request.model)
        renderer = service.renderers[model.base]
        tools = request.offered
        prompt = await renderer.chat(request.messages, model.system_prompt, model.response_prefix, model.date, tools)
        choices = choices_of(
            [prompt],
            request,
            model.edit_key,
            max_tokens=request.limit or service.args.default_max_tokens,
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            grammar=await grammar_of(request.response_format),
            shown=renderer.shown_in(renderer.tool_format) if tools and renderer.tool_format else (),
        )
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        with _about_messages():
            if request.stream:
                return await streamed(_chunks(service, renderer, model, request, choices, head))
            with service.admitted(request, 1):
                events = await gathered(service.engines, model, choices)
        answers = [_answer(renderer, request, choice, event) for choice, event in zip(choices, events)]
        usage = usage_of(choices, dict(enumerate(events)))
        return json_response({**head, "object": "chat.completion", "choices": answers, "usage": usage})

    return routes


@contextmanager
def _about_messages() -> Iterator[None]:
    """What an engine calls the prompt, a chat's request calls messages."""
    try:
        yield
    except RequestError as error:
        if error.param == "prompt":
            error.param = "messages"
        raise


def _reader(renderer: Renderer, request: ChatRequest) -> AnswerReader:
    names = [tool.function.name for tool in request.offered]
    return AnswerReader(renderer.tool_format if names else None, names, request.parallel_tool_calls is not False)


def _answer(renderer: Renderer, request: ChatRequest, choice: Choice, event: Event) -> dict[str, Any]:
    reader = _reader(renderer, request)
    text = reader.push(event.text)
    rest, calls = reader.finish(event.finish_reason == "stop")
    message: dict[str, Any] = {"role": "assistant", "content": text + rest, "refusal": None}
    if calls:
        message |= {"content": text.strip() or None, "tool_calls": [call.as_json() for call in calls]}
    return {
        "index": choice.index,
        "message": message,
        "logprobs": logprobs_of(renderer, event) if request.logprobs else None,
        "finish_reason": "tool_calls" if calls else event.finish_reason,
    }


async def _chunks(
    service: Service,
    renderer: Renderer,
    model: ServedModel,
    request: ChatRequest,
    choices: list[Choice],
    head: dict[str, Any],
) -> AsyncIterator[bytes]:
    head = {**head, "object": "chat.completion.chunk"}
    if request.include_usage:
        head["usage"] = None  # of every chunk but the last

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return sse({**head, "choices": [choice]})

    last: dict[int, Event] = {}
    readers = [_reader(renderer, request) for _ in choices]
    with service.admitted(request, 1):
        async with aclosing(merged(service.engines, model, choices)) as events:
            async for choice, event in events:
                if choice.index not in last:
                    yield chunk(choice.index, {"role": "assistant", "content": "", "refusal": None})
                last[choice.index] = event
                reader, calls = readers[choice.index], []
                text = reader.push(event.text)
                if event.finish_reason is not None:
                    rest, calls = reader.finish(event.finish_reason == "stop")
                    text += rest
                logprobs = logprobs_of(renderer, event) if request.logprobs and event.logprobs else None
                if text or logprobs:
                    yield chunk(choice.index, {"content": text}, logprobs=logprobs)
                if calls:
                    whole = [{"index": i, **call.as_json()} for i, call in enumerate(calls)]
                    yield chunk(choice.index, {"tool_calls": whole})
                if event.finish_reason is not None:
                    yield chunk(choice.index, {}, "tool_calls" if calls else event.finish_reason)
    if request.include_usage:
        yield sse({**head, "choices": [], "usage": usage_of(choices, last)})


def logprobs_of(renderer: Renderer, event: Event) -> dict[str, Any]:
    """Of the tokens that make the text: the one that ended it is not among them."""

    def described(token_id: int, logprob: float) -> dict[str, Any]:
        text = renderer.token_text(token_id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": renderer.token_bytes(token_id)}

    def entry(token: TokenLogprob) -> dict[str, Any]:
        top = [described(token_id, logprob) for token_id, logprob in token.top]
        return {**described(token.token_id, token.logprob or 0.0), "top_logprobs": top}

    shown = [token for token in event.logprobs if token.token_id not in renderer.special_ids]
    return {"content": [entry(token) for token in shown], "refusal": None}
