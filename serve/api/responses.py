"""What the API answers with, as OpenAPI documents it. The routes build plain dictionaries of these shapes."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob] | None
    refusal: None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AboutModel(BaseModel):
    kind: Literal["base", "trial", "run", "saved"] | None
    run: str | None
    trial: int | None
    base: str | None
    """Model id that it is an edit of."""

    metrics: dict[str, float]
    description: str
    problem: str | None
    """Why it cannot be used; None if it can."""


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    bruno: AboutModel


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Status(BaseModel):
    status: str


class Readiness(Status):
    engines: dict[str, bool]


class Stats(BaseModel):
    engines: dict[str, dict[str, Any]]
    """Engine -> sums over its copies, and how many there are."""

    api: dict[str, Any]


class FrontRow(BaseModel):
    trial: int
    values: dict[str, float]
    counts: dict[str, tuple[int, int]]
    description: str
    model: str


class Front(BaseModel):
    run: str
    objectives: list[str]
    rows: list[FrontRow]


class RunConfig(BaseModel):
    markers: list[str]
    system_prompt: str | None
    base: str


class Config(BaseModel):
    auth: bool
    runs: dict[str, RunConfig]


class Evaluation(BaseModel):
    id: str
    object: Literal["evaluation"]
    created: int
    model: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: dict[str, int]
    """``done`` of ``total`` answers and comparisons."""

    result: dict[str, Any] | None
    error: str | None


class EvaluationList(BaseModel):
    object: Literal["list"]
    data: list[Evaluation]
