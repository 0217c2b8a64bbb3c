"""What the API answers with, as OpenAPI documents it.

The routes build plain dictionaries of these shapes: validating each piece of each answer would cost more than making
it. The tests validate every body that a server of theirs sends (``tests/serve/bodies.py``).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Body):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Body):
    error: ErrorDetail


class Usage(Body):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(Body):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Body):
    content: list[ContentLogprob] | None
    refusal: None


class CalledFunction(Body):
    name: str
    arguments: str
    """JSON of an object."""


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ToolCallDelta(ToolCall):
    """A whole call: it is known when the answer has ended."""

    index: int


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: str | None
    """None where it has only called tools."""

    refusal: None
    tool_calls: list[ToolCall] | None = None
    """Only there if tools were called."""


class ChatChoice(Body):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Body):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Body):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Body):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(Body):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(Body):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Body):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Body):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Body):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(Body):
    """An event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class AboutModel(Body):
    kind: Literal["base", "trial", "run", "saved"] | None
    run: str | None
    trial: int | None
    base: str | None
    """Model id that it is an edit of."""

    metrics: dict[str, float]
    description: str
    scalable: bool
    """Whether `ID*X` is a model as well: this edit with every strength multiplied by X, 0 to 2 in steps of 0.01."""

    problem: str | None
    """Why it cannot be used; None if it can."""


class ModelCard(Body):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    bruno: AboutModel


class ModelList(Body):
    object: Literal["list"]
    data: list[ModelCard]


class Status(Body):
    status: str


class Readiness(Status):
    engines: dict[str, bool]


class Stats(Body):
    engines: dict[str, dict[str, Any]]
    """Engine -> sums over its copies, and how many there are."""

    api: dict[str, Any]


class FrontRow(Body):
    trial: int
    values: dict[str, float]
    counts: dict[str, tuple[int, int]]
    description: str
    model: str


class Front(Body):
    run: str
    objectives: list[str]
    rows: list[FrontRow]


class RunConfig(Body):
    markers: list[str]
    system_prompt: str | None
    base: str


class Config(Body):
    auth: bool
    runs: dict[str, RunConfig]


class Evaluation(Body):
    id: str
    object: Literal["evaluation"]
    created: int
    model: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: dict[str, int]
    """``done`` of ``total`` answers and comparisons."""

    result: dict[str, Any] | None
    error: str | None


class EvaluationList(Body):
    object: Literal["list"]
    data: list[Evaluation]
