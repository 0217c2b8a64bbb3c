"""One model copy that answers many requests at once: continuous batching over the base model and its edits.

    engine = ServingEngine(load_model(settings), EngineSettings())
    engine.add_edit("run:trial-7", edit, bank)
    async for event in engine.generate(GenerationRequest(prompt_ids, edit="run:trial-7", max_tokens=64)):
        print(event.text, end="")

A thread of its own runs the step loop. A step reads some prompts (``prefill_tokens`` at most), then makes one token
for every running row; so rows join and leave at any step, and neither a long prompt nor a long answer holds up the
others. What happens in a part of a step is told to each event loop in one call.

Greedy text is the same whatever else is in the batch up to rounding: see ``batch``.
"""

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import torch

from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.generation.text_stream import Decoder
from bruno_ray.model.loading import LoadedModel
from serve.engine.batch import EditableModel
from serve.engine.grammar import Grammars, GrammarState
from serve.engine.loop import Outbox, StepLoop
from serve.engine.sampling import TokenLogprob
from serve.engine.scores import ScoreJob
from serve.engine.types import EngineStats, Event, GenerationRequest, Mailbox, Row
from serve.errors import EngineError, InvalidRequest, Overloaded, TooLong
from serve.settings import EngineSettings

__all__ = ["EngineStats", "Event", "GenerationRequest", "ServingEngine", "TokenLogprob"]

logger = logging.getLogger(__name__)

MOST_EDITS = 256  # an edit of an 8-billion-parameter model holds some two megabytes
STOPPED = 1_000_000  # failed steps that are reported once the thread has ended by itself


class ServingEngine:
    """See above. Raises ModelError for models whose cache cannot be kept row by row."""

    def __init__(self, loaded: LoadedModel, settings: EngineSettings) -> None:
        self._editor = LiveEditor(loaded.architecture)
        self._edits: OrderedDict[str, ResolvedEdit] = OrderedDict()  # those asked for last at the end
        self._resolving = threading.Lock()
        self._settings = settings
        self._vocabulary = loaded.architecture.embedding.weight.shape[0]
        config: Any = loaded.model.config
        self._n_logits = config.get_text_config().vocab_size
        self._grammars = Grammars(loaded.tokenizer, loaded.eos_token_ids)
        self._decoder = Decoder(loaded.tokenizer)
        self._changed = threading.Condition()
        self._closing = False
        self._n_requests = 0
        with torch.inference_mode():
            self._steps = StepLoop(EditableModel(loaded, self._editor), settings, frozenset(loaded.eos_token_ids))
        self.max_context = self._steps.max_context
        """Tokens of prompt and answer together."""

        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ----- what is asked of it -----

    def add_edit(self, key: str, edit: Edit, bank: DirectionBank) -> None:
        """Make ``edit`` known as ``key``; it is worked out once, which may read weights (seconds on a large model).

        A key that is known already must mean the same edit. Raises ValueError if it does not. Of very many edits the
        one that has not been asked for longest is forgotten; rows that carry it go on.
        """
        with self._resolving:
            known = self._edits.get(key)
            if known is None:
                self._edits[key] = self._editor.resolve(edit, bank)
            elif known.edit != edit:
                raise ValueError(f"{key} is already another edit: give each edit a key of its own")
            while len(self._edits) > MOST_EDITS:
                self._edits.popitem(last=False)

    def knows(self, key: str) -> bool:
        """Whether the edit can be asked for; if so, it is the one that will be forgotten last."""
        try:
            self._edits.move_to_end(key)
        except KeyError:
            return False
        return True

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Events of one answer, the last with a finish reason. Closing the iterator takes the row out at the next step.

        Raises, before anything is queued, TooLong, InvalidRequest, Overloaded, or EngineError when it is closed.
        """
        edit = self._check(request)
        grammar = await self._grammar(request)
        mailbox = Mailbox(asyncio.get_running_loop())
        with self._changed:
            self._admit(self._steps.n_rows)
            self._n_requests += 1
            row = Row.create(request, edit, self._n_requests, mailbox, self._decoder, grammar)
            self._steps.waiting.append(row)
            self._changed.notify()
        try:
            while True:
                event = await mailbox.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            row.cancelled = True

    async def next_logprobs(self, prompts: Sequence[Sequence[int]], edits: Sequence[str | None]) -> np.ndarray:
        """Float32 log-probabilities (K, P, V) of the token after each prompt under each edit.

        Made in pieces between the steps of running answers. Raises as ``generate`` does.
        """
        if not prompts or not edits:
            raise InvalidRequest("next_logprobs needs at least one prompt and one edit")
        resolved = [self._resolved(edit) for edit in edits]
        for prompt in prompts:
            self._check_prompt(prompt, 0)
        job = ScoreJob(prompts, resolved, asyncio.get_running_loop())
        with self._changed:
            self._admit(len(self._steps.scores))
            self._steps.scores.append(job)
            self._changed.notify()
        try:
            return await job.future
        finally:
            job.cancelled = True

    def stats(self) -> EngineStats:
        """Cheap, and never behind generation."""
        return self._steps.stats()

    def close(self) -> None:
        """End the thread; whoever still waits gets an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._editor.close()

    # ----- checks -----

    def _check(self, request: GenerationRequest) -> ResolvedEdit | None:
        if request.max_tokens < (0 if request.prompt_logprobs else 1):
            raise InvalidRequest("max_tokens must be at least 1 (0 only with the prompt's logprobs)")
        self._check_prompt(request.prompt_ids, min(request.max_tokens, 1))
        biased = [token_id for token_id, _ in request.penalties.bias] if request.penalties is not None else []
        if biased and (min(biased) < 0 or max(biased) >= self._n_logits):
            raise InvalidRequest(f"logit_bias has a token id outside of 0..{self._n_logits - 1}", "logit_bias")
        return self._resolved(request.edit)

    async def _grammar(self, request: GenerationRequest) -> GrammarState | None:
        """Made beside the event loop: a large grammar takes a second."""
        if request.grammar is None:
            return None
        return await asyncio.to_thread(self._grammars.state, request.grammar)

    def _check_prompt(self, prompt_ids: Sequence[int], n_new: int) -> None:
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty: send at least one token", "prompt")
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._vocabulary:
            raise InvalidRequest(f"the prompt has a token id outside of 0..{self._vocabulary - 1}", "prompt")
        if len(prompt_ids) + n_new > self.max_context:
            raise TooLong(
                f"the prompt has {len(prompt_ids)} tokens, and prompt and answer together may have"
                f" {self.max_context}: shorten the prompt",
                "prompt",
            )

    def _resolved(self, key: str | None) -> ResolvedEdit | None:
        if key is not None and key not in self._edits:
            raise InvalidRequest(f"there is no edit {key!r} in this engine")
        return None if key is None else self._edits[key]

    def _admit(self, n_known: int) -> None:
        """Refuse what would wait behind a full queue. Holds the lock."""
        if self._closing:
            raise EngineError("the engine is shut down: start the server again")
        if n_known >= self._settings.max_rows + self._settings.max_waiting:
            seconds = self._steps.seconds_to_room()
            raise Overloaded(f"{n_known} requests are running or waiting: try again in {seconds:.0f} s", seconds)

    # ----- the thread -----

    def _run(self) -> None:
        reason = "the engine is shut down: start the server again"
        try:
            with torch.inference_mode():
                self._step_until_closed()
        except Exception as error:
            logger.exception("the engine has stopped")
            reason = f"the engine has stopped ({type(error).__name__}): start the server again"
            self._steps.n_failed += STOPPED
        with self._changed:  # from here on nobody is let in
            self._closing = True
        self._deliver(self._steps.abandon(reason))

    def _step_until_closed(self) -> None:
        while True:
            with self._changed:
                while not self._closing and not self._steps.has_work():
                    self._changed.wait()
                if self._closing:
                    return
                self._steps.take_new()
            self._steps.step(self._deliver)

    def _deliver(self, outbox: Outbox) -> None:
        """One call into every event loop, whatever it holds."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        for loop, call in outbox:
            by_loop.setdefault(loop, []).append(call)
        for loop, calls in by_loop.items():
            try:
                loop.call_soon_threadsafe(_call_all, calls)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._steps.forget(loop)


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
