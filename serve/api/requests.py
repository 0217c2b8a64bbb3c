"""Requests of the OpenAI-compatible API, as a client sends them.

A field that changes what is generated is understood or refused; one that does not is read and left alone
(``left_alone``); any other is refused by name. ``null`` is the same as leaving a field out.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serve.api.fields import (
    NO_LIST,
    NO_OBJECT,
    NO_TEXT,
    MayBeUnlimited,
    Request,
    Stop,
    Text,
    TokenId,
    Unsupported,
    refuse,
)
from serve.api.formats import ResponseFormat
from serve.api.left_alone import ContentExtras, GenerationExtras, MessageExtras
from serve.api.tools import Tool, ToolCall

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_TOOLS = 128
SEED_RANGE = 2**63
BiasedToken = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Length = Annotated[Annotated[int, Field(ge=1)] | None, MayBeUnlimited]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Request):
    include_usage: bool | None = False
    """Send a last chunk with the token counts and no choices."""

    include_obfuscation: bool | None = False
    """Read and left alone, as is the next."""

    continuous_usage_stats: bool | None = False


class Generation(GenerationExtras):
    """What chat completions and completions have in common."""

    model: Text
    """An id that GET /v1/models lists, or any BASE:trial-N."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    """0 is greedy."""

    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    seed: Annotated[int, Field(ge=-SEED_RANGE, lt=SEED_RANGE)] | None = None
    """Choice i is seeded with seed + i. The same request then gives the same text."""

    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    """Where an answer ends; not part of it."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = False
    """Go on after the end-of-sequence token, for measurements."""

    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    """Taken off a token's logit for every time that it is in the answer."""

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    """Taken off a token's logit if it is in the answer."""

    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = 1.0
    """Tokens of prompt and answer become less likely above 1 (Keskar et al. 2019); not a field of OpenAI's."""

    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=MAX_BIASES)] | None = None
    """Added to the logits of these tokens, by their ids."""

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = 0
    """Only so many of the likeliest tokens; 0 and -1 are all. Not a field of OpenAI's."""

    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    """Only tokens at least so many times as likely as the likeliest. Not a field of OpenAI's."""

    @model_validator(mode="after")
    def _supported(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise Unsupported("stream_options", "stream_options is for requests with stream set to true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


# ----- chat -----


class TextPart(ContentExtras):
    type: Literal["text", "input_text", "output_text"]
    text: Text


class Message(MessageExtras):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)] | None = None
    """Left out only where the assistant has called tools."""

    name: Text | None = None
    """Handed to the chat template, which may use it."""

    tool_calls: list[ToolCall] | None = None
    """Of the assistant."""

    tool_call_id: Text | None = None
    """Of role tool: which call this is the result of."""

    refusal: str | None = Field(None, json_schema_extra=NO_TEXT)
    function_call: dict[str, Any] | None = Field(None, json_schema_extra=NO_OBJECT)
    audio: dict[str, Any] | None = Field(None, json_schema_extra=NO_OBJECT)

    @model_validator(mode="after")
    def _supported(self) -> "Message":
        refuse(self.refusal, "refusal", "put it into content")
        refuse(self.function_call, "function_call", "tool_calls is")
        refuse(self.audio, "audio", "only text is")
        if self.tool_calls and self.role != "assistant":
            raise Unsupported("tool_calls", "tool_calls are the assistant's")
        if self.content is None and not self.tool_calls:
            raise Unsupported("content", "content is missing")
        if self.role == "tool" and self.tool_call_id is None:
            raise Unsupported("tool_call_id", "a message of role tool says which call it is the result of")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    """The last one is the user's."""

    max_tokens: Length = None
    """-1 is the same as leaving it out."""

    max_completion_tokens: Length = None
    """The newer name of max_tokens; the same if both are given."""

    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    """Of the answer: any text, any JSON object, or JSON of a schema. JSON needs llguidance (the extra `[grammar]`)."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    """For models whose chat template has them, in a form that is known."""

    functions: list[Any] | None = Field(None, json_schema_extra=NO_LIST)
    tool_choice: Literal["none", "auto"] | None = None
    """`none` keeps the tools from the model."""

    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    """False gives out only the first call of an answer."""

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        refuse(self.functions, "functions", "tools is")
        if self.top_logprobs is not None and not self.logprobs:
            raise Unsupported("top_logprobs", "top_logprobs needs logprobs set to true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise Unsupported("max_tokens", "max_tokens and max_completion_tokens differ: send one of them")
        if self.messages[-1].role == "assistant":
            raise Unsupported("messages", "the last message is the assistant's; continuing it is not supported")
        return self

    @property
    def offered(self) -> list[Tool]:
        """Tools that the model hears of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


# ----- completions -----


class CompletionRequest(Generation):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    """A text, several, the token ids of one, or of several."""

    max_tokens: Annotated[Annotated[int, Field(ge=0)] | None, MayBeUnlimited] = 16
    """0 only with echo; -1 is as long as a chat answer may be."""

    echo: bool | None = False
    """Put the prompt before its completion; with logprobs, its tokens' as well."""

    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Alternatives to each token; 0 gives the token's own."""

    suffix: str | None = Field(None, json_schema_extra=NO_TEXT)
    """Only an empty one is supported."""

    best_of: Annotated[int, Field(ge=1)] | None = None
    """Only the same as n is supported."""

    add_special_tokens: bool | None = True
    """Whether a text is tokenised as the model's tokenizer does by itself (with the beginning-of-sequence token where
    it has one)."""

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        refuse(self.suffix, "suffix", "only an empty one is")
        if self.best_of is not None and self.best_of != self.n:
            raise Unsupported("best_of", "best_of is not supported (only the same as n is)")
        if self.max_tokens == 0 and not self.echo:
            raise Unsupported("max_tokens", "max_tokens is 0 and echo is off: nothing would be returned")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt: its text or its token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


# ----- evaluations -----


class EvaluationRequest(Request):
    model: Text
    target: Annotated[list[Text], Field(min_length=1)] | None = None
    """Prompts whose answers are looked through for markers; the run's own test prompts when not given."""

    baseline: Annotated[list[Text], Field(min_length=1)] | None = None
    """Prompts on which the model is compared with its base; the run's own test prompts when not given."""

    markers: list[Stop] | None = None
    """Phrases that show the behaviour; the run's own when not given."""

    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Longest answer that is looked through; as in the run, or 30, when not given."""

    samples: Annotated[int, Field(ge=0, le=1000)] | None = 10
    """Answers per side that the result quotes."""
