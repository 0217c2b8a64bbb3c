"""What the decode loop keeps: the cache's buffers, the growing answers, drafts of answers, and their texts.

Axes: B rows of a batch, J tokens of one step, N new tokens, Q distinct prompts, M remembered answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

TokenIds = Sequence[int]

DRAFT_SHARE = 0.5  # of the running rows must have a proposal, or the others' share of the wider step is wasted
REMEMBERED_ANSWERS = 12  # per prompt
REMEMBERED_PROMPTS = 4096
REMEMBERED_TEXTS = 100_000


@dataclass(frozen=True)
class Response:
    """One greedy answer."""

    token_ids: tuple[int, ...]
    """Without the end-of-sequence token."""

    text: str
    """Without special tokens."""

    ended: bool
    """The model wrote an end-of-sequence token."""

    decided: bool = False
    """Generation stopped because ``decide`` said so."""

    finite: bool = True
    """False when a logit was not a number: the answer stops before it."""

    end_id: int | None = None
    """The token that ended it."""

    @property
    def to_its_end(self) -> tuple[int, ...]:
        """Its tokens with the one that ends it, if it was ended."""
        return self.token_ids if self.end_id is None else (*self.token_ids, self.end_id)


class BufferedLayer(DynamicLayer):
    """Keys and values of one attention layer, in a buffer with room for the answer.

    ``DynamicLayer`` concatenates: it copies the whole cache at every token.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, heads, new, head_dim); returns views of everything so far."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._capacity = max(self._capacity, self._length)
            self._keys, self._values = self._room(key_states), self._room(value_states)
        elif self._length > self._capacity:  # refused drafts have used up the room
            self._capacity = self._length + self._capacity // 2
            held = self._keys[..., :start, :], self._values[..., :start, :]
            self._keys, self._values = self._room(key_states), self._room(value_states)
            self._keys[..., :start, :], self._values[..., :start, :] = held
        self._keys[..., start : self._length, :] = key_states
        self._values[..., start : self._length, :] = value_states
        self._expose()
        return self.keys, self.values

    def held(self, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Views of keys and values up to a column, (B, heads, columns, head_dim)."""
        return self._keys[..., : self._length, :][..., :end, :], self._values[..., : self._length, :][..., :end, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows."""
        if self.is_initialized:
            rows = beam_idx.to(self._keys.device)
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
            self._expose()

    def _room(self, states: Tensor) -> Tensor:
        return states.new_zeros(*states.shape[:-2], self._capacity, states.shape[-1])

    def _expose(self) -> None:
        self.keys, self.values = self._keys[..., : self._length, :], self._values[..., : self._length, :]


def is_asked(length: Any) -> Any:
    """At which lengths of an answer ``decide`` is asked, whatever a batch does: a number, or an array of numbers."""
    return (length <= 4) | (length % 4 == 0)


class Answers:
    """The answers of one batch while they grow. Arrays are indexed by the batch's original rows."""

    def __init__(self, n_rows: int, max_new_tokens: int, end_ids: frozenset[int]):
        self.tokens = np.zeros((n_rows, max_new_tokens), dtype=np.int64)
        self.length = np.zeros(n_rows, dtype=np.int64)
        self.ended, self.decided, self.finished = (np.zeros(n_rows, dtype=bool) for _ in range(3))
        self.finite = np.ones(n_rows, dtype=bool)
        self.end_id = np.zeros(n_rows, dtype=np.int64)
        self._end_ids = np.array(sorted(end_ids))

    def extend(self, active: np.ndarray, next_BJ: np.ndarray, fine_BJ: np.ndarray, draft_BJ: np.ndarray) -> np.ndarray:
        """Take the model's choices ``next_BJ`` after the pending token and each token of the draft.

        A choice counts while the draft before it is what the model itself had chosen, up to an end of sequence or
        a logit that is no number (``fine_BJ`` False). Returns how many tokens each row took.
        """
        n_steps = next_BJ.shape[1]
        agrees = np.cumprod(next_BJ[:, : n_steps - 1] == draft_BJ, axis=1).astype(bool)
        counts = np.concatenate([np.ones((len(active), 1), dtype=bool), agrees], axis=1)
        counts &= ~self.finished[active][:, None]
        column_BJ = self.length[active][:, None] + np.arange(n_steps)
        counts &= column_BJ < self.tokens.shape[1]
        stop = counts & (~fine_BJ | np.isin(next_BJ, self._end_ids))
        counts &= np.cumsum(stop, axis=1) == 0
        rows, steps = np.nonzero(counts)
        self.tokens[active[rows], column_BJ[rows, steps]] = next_BJ[rows, steps]
        taken_B = counts.sum(axis=1)
        self.length[active] += taken_B
        stopped = stop.any(axis=1)
        first = np.arange(len(active)), stop.argmax(axis=1)
        fine = fine_BJ[first]
        self.end_id[active[stopped]] = next_BJ[first][stopped]
        self.ended[active[stopped & fine]] = True
        self.finite[active[stopped & ~fine]] = False
        self.finished[active] |= stopped | (self.length[active] == self.tokens.shape[1])
        return taken_B

    def decide(self, active: np.ndarray, taken_B: np.ndarray, verdicts: Callable[[np.ndarray], np.ndarray]) -> None:
        """Cut rows at the first length at which the verdict is True, so that drafts change nothing."""
        for back in range(int(taken_B.max(initial=0)), 0, -1):
            length_B = self.length[active] - back + 1
            asked = (back <= taken_B) & ~self.decided[active] & is_asked(length_B)
            for length in np.unique(length_B[asked]):
                rows = active[asked & (length_B == length)]
                cut = rows[verdicts(self.tokens[rows, :length])]
                self.length[cut] = length
                self.decided[cut] = self.finished[cut] = self.finite[cut] = True
                self.ended[cut] = False

    def responses(self, texts: "Detokenizer") -> list[Response]:
        sequences = [tuple(tokens[:n]) for tokens, n in zip(self.tokens.tolist(), self.length.tolist())]
        rows = zip(self.ended.tolist(), self.decided.tolist(), self.finite.tolist(), self.end_id.tolist())
        return [
            Response(sequence, text, ended, decided, finite, end_id if ended else None)
            for sequence, text, (ended, decided, finite, end_id) in zip(sequences, texts(sequences), rows)
        ]


class Drafts:
    """What prompts were answered before, newest first. A bad draft costs time and changes no answer."""

    def __init__(self) -> None:
        self._answers: dict[tuple[int, ...], list[tuple[int, ...]]] = {}

    def open(self, prompts: Sequence[TokenIds], max_new_tokens: int) -> "BatchDrafts":
        return BatchDrafts(self._answers, [tuple(prompt) for prompt in prompts], max_new_tokens)


class BatchDrafts:
    """The remembered answers to one batch's prompts, as one array: axes Q distinct prompts, M answers, N tokens."""

    def __init__(self, remembered: dict, prompts: list[tuple[int, ...]], max_new_tokens: int):
        self._remembered, self._prompts = remembered, prompts
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self._prompt_of_row = np.array([index[prompt] for prompt in prompts])
        known = [remembered.get(prompt, []) for prompt in index]
        self._known_QMN = np.full((len(index), max(map(len, known)), max_new_tokens), -1, dtype=np.int64)
        for q, answers in enumerate(known):
            for m, answer in enumerate(answers):
                self._known_QMN[q, m, : len(answer)] = answer[:max_new_tokens]

    def propose(self, active: np.ndarray, answers: Answers, limit: int) -> np.ndarray:
        """How each row may go on, (B, J) padded with -1: the newest answer that begins as the row's does."""
        nothing = np.empty((len(active), 0), dtype=np.int64)
        if limit < 1 or self._known_QMN.shape[1] == 0:
            return nothing
        known_BMN = self._known_QMN[self._prompt_of_row[active]]
        length_B = answers.length[active]
        N = known_BMN.shape[2]
        behind = np.arange(N) >= length_B[:, None]
        fits_BM = ((known_BMN == answers.tokens[active][:, None]) | behind[:, None]).all(axis=2)
        # An answer that stops here proposes nothing.
        fits_BM &= known_BMN[np.arange(len(active)), :, np.minimum(length_B, N - 1)] >= 0
        fits_BM &= ~answers.finished[active][:, None]
        has_B = fits_BM.any(axis=1)
        if has_B.sum() < DRAFT_SHARE * (~answers.finished[active]).sum():
            return nothing
        chosen_BN = known_BMN[np.arange(len(active)), fits_BM.argmax(axis=1)]
        column_BJ = length_B[:, None] + np.arange(limit)
        draft_BJ = np.take_along_axis(chosen_BN, np.minimum(column_BJ, N - 1), axis=1)
        # The last token of an answer needs no forward pass after it, so it is not worth proposing.
        draft_BJ[~has_B[:, None] | (column_BJ >= N - 1)] = -1
        return draft_BJ[:, : int((draft_BJ >= 0).sum(axis=1).max(initial=0))]

    def close(self, answers: Answers) -> None:
        """Remember the finished answers."""
        found = dict.fromkeys(
            (prompt, tuple(tokens[:n]))
            for prompt, tokens, n in zip(self._prompts, answers.tokens.tolist(), answers.length.tolist())
        )
        if len(self._remembered) > REMEMBERED_PROMPTS:
            self._remembered.clear()
        for prompt, answer in found:
            others = [other for other in self._remembered.get(prompt, []) if other != answer]
            self._remembered[prompt] = [answer, *others][:REMEMBERED_ANSWERS]


class Detokenizer:
    """Texts of token sequences; each is decoded once, since answers repeat from trial to trial."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._texts: dict[tuple[int, ...], str] = {}

    def __call__(self, sequences: Sequence[tuple[int, ...]]) -> list[str]:
        if len(self._texts) > REMEMBERED_TEXTS:
            self._texts.clear()
        unknown = [sequence for sequence in dict.fromkeys(sequences) if sequence not in self._texts]
        if unknown:
            texts = self._tokenizer.batch_decode([list(sequence) for sequence in unknown], skip_special_tokens=True)
            self._texts.update(zip(unknown, texts))
        return [self._texts[sequence] for sequence in sequences]
