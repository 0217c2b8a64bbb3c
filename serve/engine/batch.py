"""The running rows as one batch of one model, and the forward passes that let rows in.

What a row's logits are does not depend on the edits of the other rows: with the same numbers of rows and columns they
are bit-identical, edited neighbours or not (an unedited row gets exact zeros added). They may depend in their last
bits on the *shape* of the batch, since kernels for another size sum in another order: in float32 less than 2e-5 in any
log-probability. Greedy text is the same unless two tokens are that close. A row that went back for lack of room, or
whose prompt was read in chunks, is in the same position.

Axes: B rows, P joining rows, T tokens, C tokens of one chunk, V vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from bruno_ray.ablation.live import LiveEditor
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.generation.lean_forward import lean_forward, own_forward
from bruno_ray.model.batching import PaddedBatch, pad_left
from bruno_ray.model.loading import LoadedModel
from serve.engine.kv_cache import BatchCache, prefill_cache
from serve.engine.sampling import Choices, Sampler, TokenLogprob, token_logprobs
from serve.engine.types import Row

UNUSED_EDITS = 16  # edits that stay in the editor's tables after their last row has left: stacking them costs more
LOGITS_BYTES = 2**28  # logits at all positions of a prompt are made in pieces of at most this size (float32)


class EditableModel:
    """A loaded model with a live editor: one forward pass whose rows carry the edits that are named for it."""

    def __init__(self, loaded: LoadedModel, editor: LiveEditor) -> None:
        self.model = loaded.model
        self.device = loaded.device
        self.pad_id = loaded.tokenizer.pad_token_id or 0  # masked wherever it stands
        self.config = loaded.model.config
        self._editor = editor
        self._lean = lean_forward(loaded.model) if loaded.lean_forward else None
        self._table: list[ResolvedEdit] = []
        self._set: list[ResolvedEdit | None] = []

    def set_edits(self, edits: Sequence[ResolvedEdit | None]) -> None:
        """From now on row b carries ``edits[b]``."""
        edits = list(edits)
        if len(edits) == len(self._set) and all(a is b for a, b in zip(edits, self._set)):
            return
        self._set = edits
        needed = {id(edit): edit for edit in edits if edit is not None}
        if not needed:
            self._editor.clear()
            return
        known = {id(edit) for edit in self._table}
        missing = [edit for key, edit in needed.items() if key not in known]
        if missing:
            if len(self._table) + len(missing) > len(needed) + UNUSED_EDITS:
                self._table = [edit for edit in self._table if id(edit) in needed]
            self._table = [*self._table, *missing]
        index = {id(edit): i for i, edit in enumerate(self._table)}
        bare = len(self._table)
        self._editor.set([*self._table, None], [bare if edit is None else index[id(edit)] for edit in edits])

    def __call__(
        self, ids_BT: Tensor, mask_BC: Tensor, positions_BT: Tensor, cache: DynamicCache | None, keep: int
    ) -> Float[Tensor, "B keep V"]:
        """Logits at the last ``keep`` positions, in the model's dtype."""
        if self._lean is not None and not self._editor.edits_inputs:
            return self._lean(ids_BT, mask_BC, positions_BT, cache, keep)
        logits_BNV = own_forward(self.model, ids_BT, mask_BC, positions_BT, cache, keep)
        return logits_BNV.to(self.device)  # a model over several devices has them on the last one


class RunningBatch:
    """Rows that have been read and get one token per step."""

    def __init__(self, model: EditableModel, max_rows: int) -> None:
        self._model = model
        self.cache = BatchCache(model.config, max_rows)
        self.rows: list[Row] = []
        self.consistent = True
        """False while rows are moved: what failed then has left nothing to go on with."""

        self._changed()

    def step(self) -> Choices:
        """One token for every row. The row's pending token is in the cache afterwards, the new one is pending."""
        self.cache.make_room()
        self._model.set_edits([row.edit for row in self.rows])
        width = self.cache.window.width
        columns = torch.arange(width + 1, device=self._model.device)
        mask_BC = columns >= width - self._length_B1
        logits_BV = self._model(self._pending_B1, mask_BC, self._length_B1, self.cache.cache, 1)[:, -1]
        self.cache.advance()
        choices = self._sampler.choose(logits_BV)
        self._pending_B1 = choices.on_device[:, None]
        self._length_B1 = self._length_B1 + 1
        return choices

    def join(self, rows: Sequence[Row], which: Sequence[int], prefill: DynamicCache) -> None:
        """Let rows in that have been read: ``which`` rows of the prefill cache. Their last token is pending."""
        self.consistent = False
        everyone = len(which) == _n_rows(prefill)
        lengths = [len(row.tokens) - 1 for row in rows]
        self.cache.join(prefill, lengths, None if everyone else torch.tensor(which))
        pending = torch.tensor([[row.tokens[-1]] for row in rows], device=self._model.device)
        length = torch.tensor([[length] for length in lengths], device=self._model.device)
        self._pending_B1 = torch.cat([self._pending_B1, pending])
        self._length_B1 = torch.cat([self._length_B1, length])
        self.rows = [*self.rows, *rows]
        self._sampler = Sampler([row.sampling for row in self.rows], self._model.device)
        self.consistent = True

    def leave(self, leaving: Sequence[Row], broken: Sequence[Row] = ()) -> None:
        """Take rows out. What broken rows hold is not a number."""
        if not leaving:
            return
        index = {row: i for i, row in enumerate(self.rows)}
        order = self.cache.leave({index[row] for row in leaving}, [index[row] for row in broken])
        kept = torch.tensor(order, dtype=torch.long, device=self._model.device)
        self._pending_B1, self._length_B1 = self._pending_B1[kept], self._length_B1[kept]
        self.rows = [self.rows[i] for i in order]
        self._sampler = Sampler([row.sampling for row in self.rows], self._model.device)

    def clear(self) -> None:
        """No row and no memory."""
        self.rows = []
        self.cache.reset()
        self.consistent = True
        self._changed()

    def _changed(self) -> None:
        self._pending_B1: Int[Tensor, "B 1"] = torch.empty(0, 1, dtype=torch.long, device=self._model.device)
        self._length_B1: Int[Tensor, "B 1"] = torch.empty_like(self._pending_B1)
        self._sampler = Sampler([], self._model.device)


class Prefill:
    """Rows whose tokens are being read: several in one pass, or a long one in chunks."""

    def __init__(self, model: EditableModel, rows: Sequence[Row]) -> None:
        self._model = model
        self.rows = list(rows)
        self._padded: PaddedBatch | None = None
        self._n_done = 0
        self.width = max(len(row.tokens) for row in rows)
        self._with_logprobs = any(row.wants_prompt_logprobs for row in rows)
        self._going_on = any(row.request.max_tokens > row.n_completion + 1 for row in rows)
        self.cache: DynamicCache | None = None
        for row in rows:
            row.prompt_logprobs = []

    @property
    def n_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    def advance(self, n_tokens: int) -> Float[Tensor, "P V"] | None:
        """Read at most so many tokens; once all are read, the logits of the tokens that follow."""
        if self._padded is None:
            self._padded = pad_left([row.tokens for row in self.rows], self._model.pad_id, self._model.device)
        if self._with_logprobs:
            vocabulary = self._model.config.get_text_config().vocab_size
            n_tokens = min(n_tokens, LOGITS_BYTES // (4 * vocabulary))
        start = self._n_done
        end = min(self.width, start + max(1, n_tokens // len(self.rows)))
        # Rows that end with the token that follows leave nothing behind.
        if self.cache is None and (self._going_on or end < self.width):
            self.cache = prefill_cache(self._model.config, self.width)
        self._model.set_edits([row.edit for row in self.rows])
        logits_PCV = self._model(
            self._padded.input_ids[:, start:end],
            self._padded.attention_mask[:, :end],
            self._padded.position_ids[:, start:end],
            self.cache,
            end - start if self._with_logprobs else 1,
        )
        if self._with_logprobs:
            self._note_logprobs(logits_PCV, start)
        self._n_done = end
        return logits_PCV[:, -1] if end == self.width else None

    def sample(self, logits_PV: Tensor) -> Choices:
        return Sampler([row.sampling for row in self.rows], self._model.device).choose(logits_PV)

    def _note_logprobs(self, logits_PCV: Tensor, start: int) -> None:
        """Logits at a position are about the token after it."""
        for p, row in enumerate(self.rows):
            if not row.wants_prompt_logprobs:
                continue
            pad = self.width - len(row.tokens)
            if not row.prompt_logprobs:
                row.prompt_logprobs = [TokenLogprob(row.tokens[0], None)]
            first = max(start, pad)
            last = min(start + logits_PCV.shape[1], pad + row.n_prompt - 1)
            if first < last:
                ids = torch.tensor(row.tokens[first - pad + 1 : last - pad + 1], device=logits_PCV.device)
                logits_NV = logits_PCV[p, first - start : last - start]
                row.prompt_logprobs += token_logprobs(logits_NV, ids, row.request.top_logprobs or 0)


def next_logprobs(
    model: EditableModel, prompts: Sequence[Sequence[int]], edits: Sequence[ResolvedEdit | None]
) -> Float[Tensor, "P V"]:
    """Log-probabilities of the token after each prompt under its edit: float32 on the CPU."""
    padded = pad_left(prompts, model.pad_id, model.device)
    model.set_edits(edits)
    logits_P1V = model(padded.input_ids, padded.attention_mask, padded.position_ids, None, 1)
    return logits_P1V[:, -1].float().log_softmax(-1).cpu()


def _n_rows(prefill: DynamicCache) -> int:
    return next(len(layer.keys) for layer in prefill.layers if getattr(layer, "keys", None) is not None)
