"""Greedy answers, next-token logits and likelihoods of one model under many edits at once.

    engine = BatchEngine(loaded)
    edits = engine.editor.resolve_all([edit_a, edit_b], bank)
    answers = engine.generate(prompt_ids, [None, *edits], max_new_tokens=30)      # [edit][prompt]

A row of a batch is one (edit, prompt) pair, and the rows of one forward pass may carry different edits: K trials on P
prompts are one batch of K*P rows. The decode loop is our own, because then rows leave once they have ended or are
decided, the cache is not copied at every token, Python runs per step and not per row, and answers can be drafted:
under many edits a prompt is mostly answered in a few ways, so what it was answered before is proposed, and one
forward pass confirms several tokens (Leviathan et al. 2023; greedy, so the answer is the model's own).

Axes: K edits, P prompts, B rows of a batch, T tokens (left-padded), J tokens of one step, N new tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bruno_ray.ablation.live import LiveEditor
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.generation.decoding import Answers, BufferedLayer, Detokenizer, Drafts, Response, TokenIds
from bruno_ray.generation.kept import KeptAnswers
from bruno_ray.generation.lean_forward import lean_forward, own_forward
from bruno_ray.generation.prompt_reads import PromptReads
from bruno_ray.generation.text_stream import Decoder, TextStream
from bruno_ray.model.batching import TokenBudget, map_batches, pad_left
from bruno_ray.model.loading import LoadedModel

Edits = Sequence[ResolvedEdit | None]
Decide = Callable[[str], bool]

CPU_ANSWER_TOKENS = 8192  # of an answer's tokens all but the prompt's come one per step and row: a step needs many rows
LEAVING_SHARE = 0.2  # finished rows stay until they are this share of the batch: taking them out copies the cache
SHARED_TOKENS = 64  # a common beginning is read apart, in a forward pass of its own, if that spares so many
DRAFT_TOKENS = 8  # most tokens proposed at a time
DRAFT_LOGITS_BYTES = 2**28  # a draft is cut so that the logits at all of its tokens stay below this


@dataclass
class Work:
    """How far the engine has come with what it was asked last; read from another thread."""

    what: str = ""
    done: int = 0
    total: int = 0
    began: float = 0.0

    def begin(self, what: str, total: int) -> None:
        self.what, self.done, self.total, self.began = what, 0, total, time.monotonic()

    def remaining(self) -> float | None:
        """Seconds, if the rest goes like what is done; None before anything is."""
        return (time.monotonic() - self.began) * (self.total / self.done - 1) if self.done else None


class BatchEngine:
    """One model copy with its live editor and tokenizer. Every evaluation goes through it."""

    def __init__(self, loaded: LoadedModel, row_tokens: int = 0):
        """``row_tokens``: see ``limit_row_tokens``."""
        self.loaded = loaded
        self.model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.editor = LiveEditor(loaded.architecture)
        self._lean = lean_forward(self.model) if loaded.lean_forward else None
        self.device = loaded.device
        self.texts = Detokenizer(self.tokenizer)
        self._decoder = Decoder(self.tokenizer)
        self.end_ids = frozenset(loaded.eos_token_ids)
        self.tokens = 0
        """Tokens computed so far, padding and refused drafts not counted."""
        self.work = Work()
        self.drafting = loaded.dtype == "float32"
        """Whether answers that were seen before are proposed. It may change no answer, only the time.

        In float32 it does not. In 16 bits rounding tells: several tokens confirmed at a time are computed by other
        kernels than one, and 7 of 24 answers of SmolLM2 in bfloat16 became others, so that a trial's depended on what
        its worker had answered before.
        """
        self.limit_row_tokens(row_tokens)
        self._drafts = Drafts()
        self._kept: KeptAnswers | None = None
        self._pad_id = self.tokenizer.pad_token_id or 0  # masked wherever it stands

    @property
    def vocabulary_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def answer_tokens(self) -> int:
        """Tokens that one forward pass of answering may have by now, padding and room for the answer included."""
        return self._answer_budget.tokens

    def limit_row_tokens(self, row_tokens: int) -> None:
        """Tokens of one forward pass, padding and room for the answer included; 0 finds it."""
        # Scoring a prompt and answering it need different amounts of memory per token, so each finds its own budget.
        self._prompt_budget = TokenBudget.for_device(self.device, row_tokens)
        if not row_tokens and self.device.type == "cpu":
            row_tokens = CPU_ANSWER_TOKENS
        self._answer_budget = TokenBudget.for_device(self.device, row_tokens)

    # ----- what is asked of it -----

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[TokenIds], edits: Edits) -> Float[Tensor, "K P V"]:
        """Float32 logits of the token after each prompt under each edit, on the CPU; only these are computed."""
        if not ids or not edits:
            raise ValueError("next_logits needs at least one prompt and one edit")
        result_KPV: Tensor | None = None
        for edit_B, prompt_B, logits_BNV in self.last_logits(ids, edits):
            if result_KPV is None:
                result_KPV = torch.empty(len(edits), len(ids), logits_BNV.shape[-1])
            result_KPV[edit_B, prompt_B] = logits_BNV[:, -1].float().cpu()
        assert result_KPV is not None
        return result_KPV

    @torch.inference_mode()
    def last_logits(
        self, ids: Sequence[TokenIds], edits: Edits, positions: int = 1
    ) -> Iterator[tuple[Int[Tensor, " B"], Int[Tensor, " B"], Float[Tensor, "B N V"]]]:
        """Batches of (edit, prompt, logits): the indices of each row (CPU) and its logits at the last N tokens.

        The logits stay on the model's device, in its dtype: in float32 those of a batch would be as large again. N is
        ``positions``, or less if no prompt of the batch is that long; at positions before a row's first token they mean
        nothing.
        """
        rows = [(k, p) for p in range(len(ids)) for k in range(len(edits))]
        self.work.begin("prompts", len(rows))
        forward = self._scoring(ids, [p for _, p in rows], edits, [k for k, _ in rows], positions)
        for batch, logits_BNV in map_batches(forward, [len(ids[p]) for _, p in rows], self._prompt_budget):
            self.work.done += len(batch)
            index = torch.tensor([rows[row] for row in batch])
            yield index[:, 0], index[:, 1], logits_BNV

    @torch.inference_mode()
    def token_logprobs(
        self,
        ids: Sequence[TokenIds],
        continuations: Sequence[Sequence[TokenIds]],
        edits: Edits,
        reads: PromptReads | None = None,
    ) -> list[list[Float[Tensor, " N"]]]:
        """Teacher-forced log-probabilities (nats) of the tokens of ``continuations[edit][prompt]`` after the prompt.

        Continuations may differ from edit to edit and may be empty. Prompts that ``reads`` holds under their edits are
        not read again. Float32 on the CPU, as [edit][prompt].
        """
        result = [[torch.zeros(0) for _ in ids] for _ in edits]
        rows = [(k, p) for p in range(len(ids)) for k in range(len(edits)) if len(continuations[k][p])]
        if reads is not None:
            known = [(k, p) for k, p in rows if reads.has(edits[k], ids[p])]
            self._go_on(reads, ids, continuations, edits, known, result)
            rows = [row for row in rows if row not in set(known)]
        if not rows:
            return result
        tails = [list(continuations[k][p]) for k, p in rows]
        sequences = [[*ids[p], *tail] for (_, p), tail in zip(rows, tails)]
        longest = max(map(len, tails))
        self.work.begin("texts", len(rows))
        # The logits at the last token predict what would follow it, hence one position more than is read.
        forward = self._scoring(sequences, range(len(rows)), edits, [k for k, _ in rows], longest + 1)
        for batch, logits_BNV in map_batches(forward, [len(s) for s in sequences], self._prompt_budget):
            self.work.done += len(batch)
            target_BN = torch.tensor([[0] * (longest - len(tails[row])) + tails[row] for row in batch])
            for row, target_N, logits_NV in zip(batch, target_BN.to(logits_BNV.device), logits_BNV):
                n = len(tails[row])
                logprobs_NV = logits_NV[-n - 1 : -1].float().log_softmax(-1)
                k, p = rows[row]
                result[k][p] = logprobs_NV.gather(-1, target_N[-n:, None])[:, 0].cpu()
        return result

    def _go_on(
        self,
        reads: PromptReads,
        ids: Sequence[TokenIds],
        continuations: Sequence[Sequence[TokenIds]],
        edits: Edits,
        rows: list[tuple[int, int]],
        result: list[list[Float[Tensor, " N"]]],
    ) -> None:
        """`token_logprobs` of ``rows`` (edit, prompt), whose prompts were read before, into ``result``."""
        if not rows:
            return
        tails = [list(continuations[k][p]) for k, p in rows]
        longest = max(map(len, tails))
        most_rows = max(1, self._prompt_budget.tokens // longest)
        self.work.begin("texts", len(rows))
        caches = reads.caches(
            self.model.config, [edits[k] for k, _ in rows], [ids[p] for _, p in rows], longest, most_rows
        )
        for batch, cache, mask_BC in caches:
            # The prompt's last token predicts the first one of the continuation, and what pads on the right, nothing.
            n_tokens = max(len(tails[row]) for row in batch)
            fed = [[ids[rows[row][1]][-1], *tails[row][:-1]] for row in batch]
            ids_BJ = torch.tensor([row + [self._pad_id] * (n_tokens - len(row)) for row in fed], device=self.device)
            first_B1 = mask_BC.sum(1, keepdim=True)
            mask_BC = torch.cat([mask_BC, mask_BC.new_ones(ids_BJ.shape)], dim=1)
            self._set(edits, [rows[row][0] for row in batch])
            try:
                positions_BJ = first_B1 + torch.arange(n_tokens, device=self.device)
                logits_BJV = self._forward(ids_BJ, mask_BC, positions_BJ, cache, n_tokens)
            finally:
                self.editor.clear()
            for row, logits_JV in zip(batch, logits_BJV):
                (k, p), target_N = rows[row], torch.tensor(tails[row], device=logits_JV.device)
                logprobs_NV = logits_JV[: len(target_N)].float().log_softmax(-1)
                result[k][p] = logprobs_NV.gather(-1, target_N[:, None])[:, 0].cpu()
                self.tokens += len(target_N)
            self.work.done += len(batch)

    @torch.inference_mode()
    def generate(
        self,
        ids: Sequence[TokenIds],
        edits: Edits,
        max_new_tokens: int,
        decide: Decide | None = None,
        reads: PromptReads | None = None,
    ) -> list[list[Response]]:
        """Greedy answers, [edit][prompt]. ``decide`` is shown the text so far; a row leaves when it says True.

        It is asked after each of the first four tokens and after every fourth, whatever the batch does. ``reads`` keeps
        what was read of the prompts.
        """
        kept = self._kept if len(edits) == 1 and edits[0] is None else None
        result = self._found(kept, ids, max_new_tokens, decide is not None) if kept else {}
        rows = [(k, p) for p in range(len(ids)) for k in range(len(edits)) if (k, p) not in result]
        self.work.begin("answers", len(rows))

        def answer(batch: list[int]) -> Answers:
            prompts, edit_of_row = [ids[rows[row][1]] for row in batch], [rows[row][0] for row in batch]
            try:
                return self._answers(prompts, edits, edit_of_row, max_new_tokens, decide, reads)
            finally:
                self.editor.clear()

        for batch, answers in map_batches(answer, [len(ids[p]) + max_new_tokens for _, p in rows], self._answer_budget):
            responses = answers.responses(self.texts)
            result.update(zip((rows[row] for row in batch), responses))
            if kept:
                kept.add([ids[rows[row][1]] for row in batch], max_new_tokens, decide is not None, responses)
        return [[result[k, p] for p in range(len(ids))] for k in range(len(edits))]

    @contextmanager
    def keeping(self, kept: KeptAnswers | None) -> Iterator[None]:
        """Inside of the block, whole greedy answers of the unedited model come from ``kept``, and go there."""
        self._kept = kept
        try:
            yield
        finally:
            self._kept = None

    def _found(
        self, kept: KeptAnswers, ids: Sequence[TokenIds], max_new_tokens: int, decided: bool
    ) -> dict[tuple[int, int], Response]:
        found = {(0, p): kept.find(prompt, max_new_tokens, decided) for p, prompt in enumerate(ids)}
        known = {place: answer for place, answer in found.items() if answer is not None}
        texts = self.texts([answer.token_ids for answer in known.values()])
        return {place: replace(answer, text=text) for (place, answer), text in zip(known.items(), texts)}

    @torch.inference_mode()
    def stream(
        self,
        ids: TokenIds,
        edit: ResolvedEdit | None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """Pieces of one answer as they are made, never to be taken back. Temperature 0 is greedy."""
        text = TextStream(self._decoder)
        cache = self._cache(len(ids), max_new_tokens)
        input_ids = torch.tensor([list(ids)], device=self.device)
        for step in range(max_new_tokens):
            mask = torch.ones(1, len(ids) + step, dtype=torch.long, device=self.device)
            positions = (mask.cumsum(-1) - 1)[:, -input_ids.shape[1] :]
            # Set anew at every token: between two of them the caller may have used the engine for something else.
            self._set([edit], [0])
            try:
                logits_V = self._forward(input_ids, mask, positions, cache, 1)[0, -1]
            finally:
                self.editor.clear()
            token = _sample(logits_V.float(), temperature, top_p)
            if token in self.end_ids:
                break
            if piece := text.push(token):
                yield piece
            input_ids = torch.tensor([[token]], device=self.device)
        if rest := text.finish():
            yield rest

    # ----- one batch -----

    def _scoring(
        self,
        sequences: Sequence[TokenIds],
        sequence_of_row: Sequence[int],
        edits: Edits,
        edit_of_row: Sequence[int],
        positions: int,
    ) -> Callable[[list[int]], Tensor]:
        """A function from row indices to the logits at their last ``positions`` tokens."""

        def forward(batch: list[int]) -> Tensor:
            try:
                rows = [sequences[sequence_of_row[row]] for row in batch]
                return self._read(rows, edits, [edit_of_row[row] for row in batch], positions)[0]
            finally:
                self.editor.clear()

        return forward

    def _read(
        self, sequences: Sequence[TokenIds], edits: Edits, edit_of_row: list[int], keep: int, n_new: int = 0
    ) -> tuple[Float[Tensor, "B N V"], Int[Tensor, "B T"], Int[Tensor, "B 1"], DynamicCache]:
        """Read whole sequences, each under its edit, which stays set.

        Returns the logits at their last ``keep`` tokens, the mask, the last position, and the cache, with room for
        ``n_new`` tokens. What all sequences begin with (a system prompt) is read once per edit.
        """
        cache = self._cache(max(map(len, sequences)), n_new)
        shared = self._shared_length(sequences, edit_of_row, keep) if self._is_masked(cache) else 0
        if shared:
            used = sorted(set(edit_of_row))
            self._set(edits, used)
            ids_KJ = torch.tensor([list(sequences[0][:shared])] * len(used), device=self.device)
            positions_KJ = torch.arange(shared, device=self.device).expand_as(ids_KJ)
            self._forward(ids_KJ, torch.ones_like(ids_KJ), positions_KJ, cache, 1)
            cache.reorder_cache(torch.tensor([used.index(edit) for edit in edit_of_row], device=self.device))
            self.tokens += ids_KJ.numel()
        self._set(edits, edit_of_row)
        rest = pad_left([sequence[shared:] for sequence in sequences], self._pad_id, self.device)
        self.tokens += int(rest.attention_mask.sum())
        mask_BT = torch.nn.functional.pad(rest.attention_mask, (shared, 0), value=1)
        positions_BJ = rest.position_ids + shared
        logits_BNV = self._forward(rest.input_ids, mask_BT, positions_BJ, cache if shared or n_new else None, keep)
        return logits_BNV, mask_BT, positions_BJ[:, -1:], cache

    def _shared_length(self, sequences: Sequence[TokenIds], edit_of_row: list[int], keep: int) -> int:
        """Length of the common beginning, if reading it once per edit spares enough."""
        first, last = min(sequences), max(sequences)
        limit = max(0, min(map(len, sequences)) - keep)
        shared = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b or i == limit), limit)
        spared = shared * (len(sequences) - len(set(edit_of_row)))
        return shared if spared >= SHARED_TOKENS else 0

    def _answers(
        self,
        prompts: list[TokenIds],
        edits: Edits,
        edit_of_row: list[int],
        max_new_tokens: int,
        decide: Decide | None,
        reads: PromptReads | None,
    ) -> Answers:
        """Greedy decoding of one batch."""
        logits_BJV, mask_BC, position_B1, cache = self._read(prompts, edits, edit_of_row, 1, max_new_tokens)
        # On a GPU memory is better spent on larger batches.
        if reads is not None and self.device.type == "cpu" and self._is_masked(cache):
            reads.keep(cache, mask_BC, prompts, [edits[k] for k in edit_of_row])
        drafts = self._drafts.open(prompts, max_new_tokens) if self.drafting and self._is_masked(cache) else None
        answers = Answers(len(prompts), max_new_tokens, self.end_ids)
        active = np.arange(len(prompts))  # which of the prompts the rows of the batch still are
        draft_BJ = np.empty((len(prompts), 0), dtype=np.int64)
        gone = 0  # rows of the batch as it is that have finished
        while True:
            # The largest logit is not a number if any of them is not, and infinite if any is.
            best_BJ, next_BJ = logits_BJV.max(dim=-1)
            next_BJ = next_BJ.to(self.device)  # a model spread over devices gives its logits on the last one
            taken_B = answers.extend(active, next_BJ.cpu().numpy(), torch.isfinite(best_BJ).cpu().numpy(), draft_BJ)
            self.tokens += int(taken_B.sum())
            if decide is not None:
                answers.decide(active, taken_B, lambda rows: self._verdicts(rows, decide))
            running_B = ~answers.finished[active]
            before, gone = gone, int((~running_B).sum())
            self.work.done += gone - before
            if not running_B.any():
                break

            # Of what was fed, the pending token and the accepted part of the draft stay visible in the cache.
            if draft_BJ.shape[1]:
                mask_BC[:, mask_BC.shape[1] - draft_BJ.shape[1] - 1 :] = torch.from_numpy(
                    (np.arange(draft_BJ.shape[1] + 1) < taken_B[:, None]).astype(np.int64)
                ).to(self.device)
            last_B = torch.from_numpy(np.maximum(taken_B - 1, 0)).to(self.device)[:, None]
            pending_B1 = next_BJ.gather(1, last_B)
            position_B1 = position_B1 + last_B + 1
            if running_B.mean() <= 1 - LEAVING_SHARE:
                keep = torch.from_numpy(np.flatnonzero(running_B)).to(self.device)
                cache.reorder_cache(keep)
                self.editor.select(keep)
                pending_B1, position_B1, mask_BC = pending_B1[keep], position_B1[keep], mask_BC[keep]
                active = active[running_B]
                gone = 0

            draft_BJ = np.empty((len(active), 0), dtype=np.int64)
            if drafts is not None:
                draft_BJ = drafts.propose(active, answers, self._draft_limit(len(active), logits_BJV))
            draft = torch.from_numpy(np.maximum(draft_BJ, 0)).to(self.device)
            ids_BJ = torch.cat([pending_B1, draft], dim=1)
            positions_BJ = position_B1 + torch.arange(ids_BJ.shape[1], device=self.device)
            mask_BC = torch.cat([mask_BC, mask_BC.new_ones(ids_BJ.shape)], dim=1)
            logits_BJV = self._forward(ids_BJ, mask_BC, positions_BJ, cache, ids_BJ.shape[1])
        if drafts is not None:
            drafts.close(answers)
        return answers

    def _verdicts(self, tokens_BN: np.ndarray, decide: Decide) -> np.ndarray:
        """``decide`` on the text of each row; equal rows are asked about once."""
        sequences = list(map(tuple, tokens_BN.tolist()))
        distinct = list(dict.fromkeys(sequences))
        verdicts = dict(zip(distinct, map(decide, self.texts(distinct))))
        return np.array([verdicts[sequence] for sequence in sequences], dtype=bool)

    def _forward(
        self, ids_BJ: Tensor, mask_BC: Tensor, positions_BJ: Tensor, cache: DynamicCache | None, keep: int
    ) -> Float[Tensor, "B J V"]:
        """Logits at the last ``keep`` positions, in the model's dtype."""
        if self._lean is not None and not self.editor.edits_inputs:
            return self._lean(ids_BJ, mask_BC, positions_BJ, cache, keep)
        return own_forward(self.model, ids_BJ, mask_BC, positions_BJ, cache, keep)

    def _set(self, edits: Edits, edit_of_row: list[int]) -> None:
        if any(edit is not None for edit in edits):
            self.editor.set(edits, edit_of_row)
        else:
            self.editor.clear()

    def _cache(self, n_prompt: int, n_new: int) -> DynamicCache:
        """The model's own kind of cache, with buffers in its attention layers.

        Layers with linear attention stay as they are, they do not grow; so do sliding windows, unless the window is
        so wide that nothing can leave it, whatever is drafted.
        """

        def is_plain(layer: object) -> bool:
            if type(layer) is DynamicSlidingWindowLayer:
                return n_prompt + n_new * (1 + DRAFT_TOKENS) <= layer.sliding_window
            return type(layer) is DynamicLayer

        cache = DynamicCache(config=self.model.config)
        room = n_prompt + n_new + DRAFT_TOKENS
        cache.layers = [BufferedLayer(room) if is_plain(layer) else layer for layer in cache.layers]
        return cache

    def _is_masked(self, cache: DynamicCache) -> bool:
        """Whether a mask hides parts of the cache: padding behind a shared beginning, refused drafts.

        So it is in plain attention; a sliding window counts hidden tokens as well, and a recurrent state takes them in.
        """
        by_mask = getattr(self.model.config.get_text_config(), "_attn_implementation", None) in ("sdpa", "eager")
        return by_mask and all(isinstance(layer, BufferedLayer) for layer in cache.layers)

    def _draft_limit(self, n_rows: int, logits_BJV: Tensor) -> int:
        fitting = DRAFT_LOGITS_BYTES // (n_rows * logits_BJV.shape[-1] * logits_BJV.element_size())
        return max(0, min(DRAFT_TOKENS, fitting - 1))


def _sample(logits_V: Float[Tensor, " V"], temperature: float, top_p: float) -> int:
    """One token by nucleus sampling (Holtzman et al. 2020, section 3.1), or the likeliest one at temperature 0."""
    if temperature <= 0:
        return int(logits_V.argmax())
    probabilities_V, order_V = (logits_V / temperature).softmax(-1).sort(descending=True)
    probabilities_V[probabilities_V.cumsum(-1) - probabilities_V > top_p] = 0  # the first one always stays
    return int(order_V[torch.multinomial(probabilities_V, 1)])
