"""The step loop's decisions: who is read next, who must go back for lack of room, what to do when something fails.

Everything here runs in the engine's thread, but for ``waiting``, ``scores`` and the numbers that ``stats`` reads.
"""

import asyncio
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from bruno_ray.errors import ModelError, first_line
from bruno_ray.model.batching import is_out_of_memory
from serve.engine import limits
from serve.engine.batch import EditableModel, Prefill, RunningBatch
from serve.engine.kv_cache import prefill_cache
from serve.engine.sampling import Choices
from serve.engine.scores import ScoreJob
from serve.engine.types import EngineStats, Event, Row
from serve.errors import EngineError
from serve.settings import EngineSettings

logger = logging.getLogger(__name__)

GROWTH = 64  # columns that rows which are let in should be able to grow before room is short
LOOK_AHEAD = 128  # waiting rows among which those of like length are looked for
MOST_READING = 8  # prompts that are read in turns
CPU_PREFILL_TOKENS = 512  # measured: more at a time are not faster, and hold up the running answers
SHORTEST_CHUNK = 64  # prompt tokens per step, however short memory is
HEAD_START_SECONDS = 0.001
"""For first tokens: else the event loop waits for the interpreter, which the next step takes again and again. Measured
with one stream: 48 ms to the first token instead of 52; eight streams were as fast as before."""

NO_NUMBERS = "the model's logits are not numbers for this request"
RECOVERY_STEPS = 200  # good steps after which limits that were cut for lack of memory are doubled again

Call = Callable[[], None]
Outbox = list[tuple[asyncio.AbstractEventLoop, Call]]


class StepLoop:
    def __init__(self, model: EditableModel, settings: EngineSettings, end_ids: frozenset[int]) -> None:
        self._model = model
        self._settings = settings
        self._end_ids = end_ids
        self._batch = RunningBatch(model, settings.max_rows)
        self.kv_tokens = settings.kv_tokens or self._kv_tokens()
        self._batch.cache.kv_tokens = self.kv_tokens
        context = limits.context_of(model.config, settings.max_context)
        self.max_context = limits.fitting_context(context, self.kv_tokens)
        if self.max_context < min(context, 64):
            raise ModelError(
                f"there is room for {self.kv_tokens} tokens of context only: raise kv_tokens, or free memory"
            )
        self.waiting: list[Row] = []
        """New rows; filled by others, emptied by ``take_new``."""

        self.scores: list[ScoreJob] = []
        self._queue: deque[Row] = deque()
        self._prefills: list[Prefill] = []
        self._outbox: Outbox = []
        self._row_limit = settings.max_rows
        on_cpu = model.device.type == "cpu"
        self._most_prefill = min(settings.prefill_tokens, CPU_PREFILL_TOKENS) if on_cpu else settings.prefill_tokens
        self._prefill_tokens = self._most_prefill
        self._read_new = False  # whether the last prompts to be read were new ones
        self._rates = limits.Rates()
        self._n_steps = self.n_failed = self._n_good = self._n_preempted = 0

    # ----- what others see -----

    @property
    def n_rows(self) -> int:
        """Running and waiting."""
        return len(self.waiting) + len(self._queue) + self._n_running

    def has_work(self) -> bool:
        return self.n_rows > 0 or bool(self.scores)

    def take_new(self) -> None:
        """Hold the lock that guards ``waiting``."""
        self._queue.extend(self.waiting)
        self.waiting.clear()

    def seconds_to_room(self) -> float:
        """When a row is likely to leave: for those who are turned away."""
        finished = self._rates.per_second()[2]
        return min(30.0, max(1.0, 1 / finished)) if finished else 5.0

    def stats(self) -> EngineStats:
        tokens, prompt_tokens, _ = self._rates.per_second()
        window = self._batch.cache.window
        return EngineStats(
            running=self._n_running,
            waiting=len(self.waiting) + len(self._queue),
            kv_tokens_used=window.rows * window.width + sum(len(job.rows) * job.width for job in list(self._prefills)),
            kv_tokens=self.kv_tokens,
            max_context=self.max_context,
            tokens_per_second=tokens,
            prompt_tokens_per_second=prompt_tokens,
            memory_bytes=limits.memory_bytes(self._model.device),
            steps=self._n_steps,
            failed_steps=self.n_failed,
            tokens=self._rates.tokens,
            prompt_tokens=self._rates.prompt_tokens,
            preemptions=self._n_preempted,
        )

    # ----- one step -----

    def step(self, deliver: Callable[[Outbox], None]) -> None:
        """Read some prompts, score some, make one token for every running row. ``deliver`` gets calls for the event
        loops: first tokens do not wait for the second ones."""
        went_well = True
        for part in (self._drop_cancelled, self._read, self._score, self._decode):
            if not self._attempt(part) and went_well:
                went_well = False
                self.n_failed += 1
                self._n_good = 0
            if self._outbox:
                deliver(self._outbox)
                self._outbox = []
                if part == self._read:
                    time.sleep(HEAD_START_SECONDS)
        if went_well:
            self.n_failed = 0
            self._n_good += 1
            if self._n_good % RECOVERY_STEPS == 0:
                self._row_limit = min(self._settings.max_rows, 2 * self._row_limit)
                self._prefill_tokens = min(self._most_prefill, 2 * self._prefill_tokens)
        self._n_steps += 1

    def abandon(self, reason: str) -> Outbox:
        """End everything with an error. Returns calls for the event loops."""
        self._outbox = []
        self._fail([*self._batch.rows, *self._being_read(), *self._queue, *self.waiting], reason)
        for job in self.scores:
            self._outbox.append((job.loop, job.fail(EngineError(reason))))
        for held in (self._queue, self.waiting, self.scores, self._prefills, self._batch.rows):
            held.clear()
        return self._outbox

    def forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop is closed: whoever waited in it is gone."""
        for row in [*self._batch.rows, *self._being_read(), *self._queue]:
            row.cancelled |= row.mailbox.loop is loop
        for job in self.scores:
            job.cancelled |= job.loop is loop

    def _attempt(self, part: Callable[[], None]) -> bool:
        """Whether the part went well. If not, its rows have been put back or ended, and the loop can go on."""
        try:
            part()
            return True
        except Exception as error:
            # Whatever a model's code raises must end the rows it concerns, not the thread that serves all others.
            out_of_memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
            reason = f"{type(error).__name__}: {first_line(error)}"
            if not out_of_memory:
                logger.exception("a step of the engine failed")
        # Outside of the handler: the traceback would keep the failed pass's tensors alive.
        if out_of_memory:
            self._shrink(part)
        elif part == self._score:
            self._fail_score(EngineError(reason))
        elif part == self._read and self._prefills and self._batch.consistent:
            self._fail(self._prefills.pop(0).rows, reason)
        else:
            self._fail([*self._batch.rows, *self._being_read()], reason)
            self._clear()
        return False

    def _read(self) -> None:
        """One piece of one prompt, or of several short ones; long prompts take turns with those that came later."""
        turn = not self._prefills or (not self._read_new and len(self._prefills) < MOST_READING)
        self._read_new = bool(turn and self._queue) and self._has_room(1, len(self._queue[0].tokens))
        if self._read_new:
            self._prefills.insert(0, Prefill(self._model, self._next_group()))
        if not self._prefills:
            return
        job = self._prefills[0]
        logits_PV = job.advance(self._prefill_tokens)
        if logits_PV is None:
            self._prefills.append(self._prefills.pop(0))
            return
        going_on = self._report(job.rows, job.sample(logits_PV), prompt_tokens=job.n_tokens)
        if going_on:
            self._make_room(len(going_on), job.width)
            which = [i for i, row in enumerate(job.rows) if row in going_on]
            self._batch.join([job.rows[i] for i in which], which, job.cache)
        self._prefills.pop(0)

    def _decode(self) -> None:
        self._make_room(0, 0)
        if not self._batch.rows:
            return
        rows = list(self._batch.rows)
        choices = self._batch.step()
        going_on = self._report(rows, choices)
        broken = [row for row, token_id in zip(rows, choices.token_ids) if token_id < 0]
        self._batch.leave([row for row in rows if row not in going_on], broken)

    def _score(self) -> None:
        if not self.scores:
            return
        job = self.scores[0]
        job.advance(self._model, self._prefill_tokens)
        if job.done:
            self._outbox.append((job.loop, job.finish()))
            self.scores.remove(job)

    def _report(self, rows: Sequence[Row], choices: Choices, prompt_tokens: int = 0) -> set[Row]:
        """Give every row its next token and tell who waits for it. Returns the rows that go on."""
        going_on: set[Row] = set()
        n_tokens = 0
        for i, (row, token_id) in enumerate(zip(rows, choices.token_ids)):
            if row.n_completion >= row.request.max_tokens:  # only the prompt's logprobs were wanted
                event = row.event(finish_reason="length")
            elif token_id < 0:
                problem = row.grammar.problem if row.grammar is not None else None
                error = f"its form cannot be followed ({problem})" if problem else NO_NUMBERS
                event = row.event(finish_reason="error", error=error)
            else:
                event = row.accept(token_id, choices.logprobs.get(i), self._end_ids, self.max_context)
                n_tokens += 1
            if event.finish_reason is None:
                going_on.add(row)
            self._send(row, event)
        self._rates.add(n_tokens, prompt_tokens, len(rows) - len(going_on))
        return going_on

    # ----- room -----

    @property
    def _n_running(self) -> int:
        return len(self._batch.rows) + sum(len(job.rows) for job in list(self._prefills))

    def _being_read(self) -> list[Row]:
        return [row for job in self._prefills for row in job.rows if row not in self._batch.rows]

    def _has_room(self, n_rows: int, width: int) -> bool:
        """Whether so many rows of so many columns can be let in, and grow for a while."""
        rows = n_rows + self._n_running
        if rows == 1:
            return True
        width = max(width, self._batch.cache.window.width, *(job.width for job in self._prefills), 0) + GROWTH
        return rows <= self._row_limit and self._batch.cache.fits(rows, width)

    def _next_group(self) -> list[Row]:
        """The first of the queue, and rows behind it that can be read in the same pass with little padding."""
        first = self._queue.popleft()
        group, shortest, longest = [first], len(first.tokens), len(first.tokens)
        for row in [self._queue[i] for i in range(min(LOOK_AHEAD, len(self._queue)))]:
            low, high = min(shortest, len(row.tokens)), max(longest, len(row.tokens))
            alike = high <= 2 * low + 16 and row.wants_prompt_logprobs == first.wants_prompt_logprobs
            fits = (len(group) + 1) * high <= self._prefill_tokens
            if alike and fits and self._has_room(len(group) + 1, high):
                group.append(row)
                shortest, longest = low, high
        chosen = set(group)
        self._queue = deque(row for row in self._queue if row not in chosen)
        return group

    def _make_room(self, joiners: int, width: int) -> None:
        """Put the youngest running rows back until the others, with the joiners, fit."""
        cache = self._batch.cache
        back: list[Row] = []
        rows = sorted(self._batch.rows, key=lambda row: row.order)
        while rows and not cache.fits(len(rows) + joiners, max(width, self._width_of(rows))):
            if len(rows) + joiners == 1:
                break  # alone a row always fits: the context is limited to that
            back.append(rows.pop())
        if back:
            self._batch.leave(back)
            self._put_back(back)

    def _width_of(self, rows: Sequence[Row]) -> int:
        return max(len(row.tokens) for row in rows)

    def _put_back(self, rows: Sequence[Row]) -> None:
        """To the head of the queue, in the order of arrival. All their tokens are read again later."""
        self._n_preempted += len(rows)
        known = {*self._queue, *rows}
        self._queue = deque(sorted(known, key=lambda row: row.order))

    # ----- when rows go or something fails -----

    def _drop_cancelled(self) -> None:
        self._batch.leave([row for row in self._batch.rows if row.cancelled])
        if any(row.cancelled for row in self._queue):
            self._queue = deque(row for row in self._queue if not row.cancelled)
        self._prefills = [job for job in self._prefills if not all(row.cancelled for row in job.rows)]
        for job in [job for job in self.scores if job.cancelled]:
            self.scores.remove(job)

    def _shrink(self, part: Callable[[], None]) -> None:
        """Memory did not suffice: everything goes back to the queue, to be read again in smaller batches."""
        rows = [*self._batch.rows, *self._being_read()]
        smallest = self._prefill_tokens <= SHORTEST_CHUNK and len(rows) <= 1
        logger.warning("out of memory with %d rows: the batch is halved", len(rows))
        self._clear()
        self._row_limit = max(1, len(rows) // 2)
        self._prefill_tokens = max(SHORTEST_CHUNK, self._prefill_tokens // 2)
        reason = "there is not enough memory for this request alone: send a shorter prompt, or lower max_tokens"
        if smallest and part == self._score:
            self._fail_score(EngineError(reason))
        elif smallest:
            self._fail(rows, reason)
            return
        self._put_back([row for row in rows if not row.finished])

    def _clear(self) -> None:
        self._batch.clear()
        self._prefills.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _fail(self, rows: Sequence[Row], reason: str) -> None:
        for row in rows:
            if not row.finished:
                self._send(row, row.event(finish_reason="error", error=reason))

    def _fail_score(self, error: Exception) -> None:
        job = self.scores.pop(0)
        self._outbox.append((job.loop, job.fail(error)))

    def _send(self, row: Row, event: Event) -> None:
        row.finished |= event.finish_reason is not None
        self._outbox.append((row.mailbox.loop, lambda: row.mailbox.put(event)))

    def _kv_tokens(self) -> int:
        """From the memory that is free, by reading one token; more than all rows can use makes no sense."""
        cache = prefill_cache(self._model.config, 1)
        one = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        self._model(one, one + 1, one, cache, 1)
        context = limits.context_of(self._model.config, self._settings.max_context)
        return min(limits.kv_tokens_that_fit(cache), self._settings.max_rows * (context + GROWTH))
