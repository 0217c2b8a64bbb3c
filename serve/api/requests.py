"""Requests of the OpenAI-compatible API, as a client sends them.

A field that changes what is generated is understood or refused; one that does not is read and left alone; any other
is refused by name. ``null`` is the same as leaving a field out.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
SEED_RANGE = 2**63


def _is_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has half of a surrogate pair, which is no character") from None
    return value


Text = Annotated[str, AfterValidator(_is_text)]
Stop = Annotated[str, AfterValidator(_is_text), Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


# Said in the schema as well; the check itself has a better message.
NO_NUMBER: dict[str, Any] = {"minimum": 0, "maximum": 0}
NO_OBJECT: dict[str, Any] = {"maxProperties": 0}
NO_LIST: dict[str, Any] = {"maxItems": 0}
NO_TEXT: dict[str, Any] = {"maxLength": 0}


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Request):
    include_usage: bool | None = False
    """Send a last chunk with the token counts and no choices."""

    include_obfuscation: bool | None = False
    """Read and left alone."""


class TextFormat(Request):
    type: Literal["text"]
    """Other formats are not supported."""


class Generation(Request):
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

    frequency_penalty: float | None = Field(0.0, json_schema_extra=NO_NUMBER)
    """Only 0 is supported."""

    presence_penalty: float | None = Field(0.0, json_schema_extra=NO_NUMBER)
    """Only 0 is supported."""

    logit_bias: dict[str, float] | None = Field(None, json_schema_extra=NO_OBJECT)
    """Only an empty one is supported."""

    user: str | None = None
    """Read and left alone, as are the other fields that do not change what is generated."""

    @model_validator(mode="after")
    def _supported(self) -> "Generation":
        refuse(self.frequency_penalty, "frequency_penalty", "only 0 is")
        refuse(self.presence_penalty, "presence_penalty", "only 0 is")
        refuse(self.logit_bias, "logit_bias", "only an empty one is")
        if self.stream_options is not None and not self.stream:
            raise Unsupported("stream_options", "stream_options is for requests with stream set to true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Unsupported(ValueError):
    """A field whose value is refused, for validators that see several fields."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def refuse(value: Any, name: str, supported: str) -> None:
    """Raise Unsupported unless ``value`` is 0, empty or None."""
    if value:
        raise Unsupported(name, f"{name} is not supported ({supported})")


# ----- chat -----


class TextPart(Request):
    type: Literal["text", "input_text", "output_text"]
    text: Text


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None
    """Handed to the chat template, which may use it."""

    refusal: str | None = Field(None, json_schema_extra=NO_TEXT)
    annotations: list[Any] | None = None
    tool_calls: list[Any] | None = Field(None, json_schema_extra=NO_LIST)
    """Only an empty one is supported, as is `function_call`."""

    function_call: dict[str, Any] | None = Field(None, json_schema_extra=NO_OBJECT)
    audio: dict[str, Any] | None = Field(None, json_schema_extra=NO_OBJECT)

    @model_validator(mode="after")
    def _supported(self) -> "Message":
        refuse(self.refusal, "refusal", "put it into content")
        refuse(self.tool_calls, "tool_calls", "there are no tools")
        refuse(self.function_call, "function_call", "there are no tools")
        refuse(self.audio, "audio", "only text is")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    """The last one is the user's."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of max_tokens; the same if both are given."""

    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    tools: list[Any] | None = Field(None, json_schema_extra=NO_LIST)
    """Only an empty one is supported, as are `functions`."""

    functions: list[Any] | None = Field(None, json_schema_extra=NO_LIST)
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        refuse(self.tools, "tools", "there are no tools")
        refuse(self.functions, "functions", "there are no tools")
        if self.top_logprobs is not None and not self.logprobs:
            raise Unsupported("top_logprobs", "top_logprobs needs logprobs set to true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise Unsupported("max_tokens", "max_tokens and max_completion_tokens differ: send one of them")
        if self.messages[-1].role == "assistant":
            raise Unsupported("messages", "the last message is the assistant's; going on with it is not supported")
        return self

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

    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    """0 only with echo."""

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
