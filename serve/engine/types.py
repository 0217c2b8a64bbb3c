"""What goes into the engine and what comes out of it, and the state of one answer in between."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.generation.text_stream import Decoder, TextStream
from serve.engine.grammar import GrammarState
from serve.engine.sampling import Sampling, TokenLogprob, Uniforms
from serve.engine.shaping import Penalties, Shaping

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to one prompt."""

    prompt_ids: tuple[int, ...]
    edit: str | None
    """Key given to ``add_edit``; None is the base model."""

    max_tokens: int
    """0 is allowed with ``prompt_logprobs``."""

    temperature: float = 1.0
    """0 is greedy."""

    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Not part of the text; text that may be the beginning of one is held back."""

    top_logprobs: int | None = None
    """None: no logprobs. A number: those of the generated tokens, with so many alternatives."""

    prompt_logprobs: bool = False
    """Also those of the prompt's tokens (that of the first is None), with as many alternatives."""

    ignore_eos: bool = False
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 is all."""

    min_p: float = 0.0
    """Only tokens at least so many times as likely as the likeliest."""

    penalties: Penalties | None = None
    shown: tuple[tuple[int, str], ...] = ()
    """Special tokens that are text in the answer, with that text."""

    grammar: str | None = None
    """Form of the answer, as llguidance writes grammars down."""


@dataclass(frozen=True)
class Event:
    """What has happened since the last one. The texts of all events make the whole text."""

    text: str = ""
    """Ready to be shown: nothing of it is taken back."""

    token_ids: tuple[int, ...] = ()
    """All generated tokens, with the end-of-sequence token and those of a stop string."""

    logprobs: tuple[TokenLogprob, ...] = ()
    """Of ``token_ids``."""

    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of all tokens of the prompt, in the first event."""

    finish_reason: FinishReason | None = None
    """In the last event."""

    error: str | None = None
    n_prompt: int = 0
    n_completion: int = 0
    """Tokens generated so far."""


def joined(events: Sequence[Event]) -> Event:
    """Consecutive events of one answer as one; at least one."""
    if len(events) == 1:
        return events[0]
    last = events[-1]
    return Event(
        text="".join(event.text for event in events),
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        logprobs=tuple(entry for event in events for entry in event.logprobs),
        prompt_logprobs=tuple(entry for event in events for entry in event.prompt_logprobs),
        finish_reason=last.finish_reason,
        error=last.error,
        n_prompt=last.n_prompt,
        n_completion=last.n_completion,
    )


@dataclass(frozen=True)
class EngineStats:
    """How busy the engine is."""

    running: int
    """Answers in the batch, and prompts being read."""

    waiting: int
    kv_tokens_used: int
    """Padding included: what counts against the limit."""

    kv_tokens: int
    max_context: int
    tokens_per_second: float
    """Generated, over the last seconds."""

    prompt_tokens_per_second: float
    memory_bytes: int
    """Allocated on the device; on a CPU what the process holds."""

    steps: int
    failed_steps: int
    """In a row: above 0 the last step failed, and many mean that the device is beyond recovery."""

    tokens: int
    """Generated since the start."""

    prompt_tokens: int
    preemptions: int
    """Rows that were put back for lack of room; they go on later, their tokens are read again."""


class Mailbox:
    """Events of one answer on their way from the engine's thread to the coroutine that waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._events: list[Event] = []
        self._ready = asyncio.Event()

    def put(self, event: Event) -> None:
        """To be called in the loop."""
        self._events.append(event)
        self._ready.set()

    async def get(self) -> Event:
        """Everything that has come since the last call, as one event."""
        await self._ready.wait()
        self._ready.clear()
        events, self._events = self._events, []
        return joined(events)


@dataclass(eq=False)
class Row:
    """One answer while it is being generated; all but ``cancelled`` belongs to the engine's thread."""

    request: GenerationRequest
    edit: ResolvedEdit | None
    order: int
    """Of arrival."""

    mailbox: Mailbox
    text: TextStream
    sampling: Sampling
    tokens: list[int]
    """The prompt's and the generated ones."""

    cancelled: bool = False
    finished: bool = False
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_reported: bool = False

    @classmethod
    def create(
        cls,
        request: GenerationRequest,
        edit: ResolvedEdit | None,
        order: int,
        mailbox: Mailbox,
        decoder: Decoder,
        grammar: GrammarState | None = None,
    ) -> "Row":
        tokens = list(request.prompt_ids)
        shaping = None
        if request.penalties is not None or grammar is not None:
            shaping = Shaping(request.penalties or Penalties(), tokens, len(tokens), grammar)
        sampling = Sampling(
            request.temperature,
            request.top_p,
            Uniforms(request.seed),
            request.top_logprobs,
            request.top_k,
            request.min_p,
            shaping,
        )
        text = TextStream(decoder, request.stop, dict(request.shown))
        return cls(request, edit, order, mailbox, text, sampling, tokens)

    @property
    def grammar(self) -> GrammarState | None:
        return self.sampling.shaping.grammar if self.sampling.shaping is not None else None

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def n_completion(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.prompt_logprobs and not self.prompt_reported

    def accept(self, token_id: int, logprob: TokenLogprob | None, end_ids: frozenset[int], max_context: int) -> Event:
        """The next token. The event says whether it is the last one."""
        self.tokens.append(token_id)
        text = self.text.push(token_id)
        reason: FinishReason | None = None
        grammar = self.grammar
        if grammar is not None:
            grammar.accept(token_id)
        at_end = token_id in end_ids and not self.request.ignore_eos
        if self.text.stopped or at_end or (grammar is not None and grammar.complete):
            reason = "stop"
        elif self.n_completion >= self.request.max_tokens or len(self.tokens) >= max_context:
            reason = "length"
        return self.event(
            text + self.text.finish() if reason else text,
            token_ids=(token_id,),
            logprobs=() if logprob is None else (logprob,),
            finish_reason=reason,
        )

    def event(self, text: str = "", **fields: object) -> Event:
        """An event with the totals, and with the prompt's logprobs if nobody has seen them yet."""
        prompt_logprobs = tuple(self.prompt_logprobs) if self.wants_prompt_logprobs else ()
        self.prompt_reported, self.prompt_logprobs = True, []
        return Event(
            text=text, prompt_logprobs=prompt_logprobs, n_prompt=self.n_prompt, n_completion=self.n_completion, **fields
        )
