"""What is done to the logits of a row before a token is chosen from them: biases, penalties, a grammar.

In the order of transformers' processors: ``logit_bias`` is added (OpenAI's API; SequenceBiasLogitsProcessor), what has
been said is divided or multiplied by the repetition penalty (CTRL, Keskar et al. 2019, section 4.1; prompt and answer),
presence and frequency penalties are subtracted (OpenAI's API; the answer alone), and what the grammar does not allow
becomes impossible. Rows that ask for none of it are not looked at.

Axes: B rows, S shaped rows, H rows with penalties, N tokens that they have said, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from serve.engine.grammar import GrammarState


@dataclass(frozen=True)
class Penalties:
    """What a request asks for; the defaults change nothing."""

    repetition: float = 1.0
    """Above 1 makes every token less likely that is in the prompt or the answer; 1 is off."""

    presence: float = 0.0
    """Subtracted from the logit of every token that is in the answer."""

    frequency: float = 0.0
    """Subtracted once for every time that a token is in the answer."""

    bias: tuple[tuple[int, float], ...] = ()
    """Token ids with what is added to their logits."""

    @property
    def of_history(self) -> bool:
        """Whether they depend on what has been said."""
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)


@dataclass(eq=False)
class Shaping:
    """How the logits of one row are shaped: one per answer, from its first token to the last."""

    penalties: Penalties
    tokens: Sequence[int]
    """The prompt's and the answer's so far: the row's own list, which grows."""

    n_prompt: int
    grammar: GrammarState | None = None
    n_counted: int = field(default=0, init=False)
    """Tokens that are in the two tables."""

    seen_V: Bool[Tensor, " V"] | None = field(default=None, init=False)
    """Which tokens are in prompt or answer. A view of the batch's table, as is the next."""

    counts_V: Int[Tensor, " V"] | None = field(default=None, init=False)
    """How often each is in the answer."""


class Shaper:
    """Shapes the rows of one composition of a batch; ``shapings`` has None for those that are left alone."""

    def __init__(self, shapings: Sequence[Shaping | None], device: torch.device | str) -> None:
        rows = [(i, shaping) for i, shaping in enumerate(shapings) if shaping is not None]
        self._shapings = [shaping for _, shaping in rows]
        self._device = device
        self._index = torch.tensor([i for i, _ in rows], dtype=torch.long, device=device)
        biases = [(s, *entry) for s, shaping in enumerate(self._shapings) for entry in shaping.penalties.bias]
        self._biased = torch.tensor([[s for s, *_ in biases], [i for _, i, _ in biases]], device=device)
        self._biases = torch.tensor([value for *_, value in biases], device=device)
        historical = [s for s, shaping in enumerate(self._shapings) if shaping.penalties.of_history]
        self._histories = [self._shapings[s] for s in historical]
        self._history_index = torch.tensor(historical, dtype=torch.long, device=device)
        penalties = [(p.repetition, p.presence, p.frequency) for p in (h.penalties for h in self._histories)]
        self._penalties_H3 = torch.tensor(penalties, device=device)
        self._tables: tuple[Bool[Tensor, "H V"], Int[Tensor, "H V"]] | None = None

    def __call__(self, logits_BV: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The logits in float32, those of shaped rows shaped. ``logits_BV`` stays as it is."""
        scores_SV = logits_BV[self._index].float()
        broken_S = ~scores_SV.amax(-1).isfinite()
        if len(self._biases):
            scores_SV.index_put_((self._biased[0], self._biased[1]), self._biases, accumulate=True)
        if self._histories:
            self._penalise(scores_SV)
        for s, shaping in enumerate(self._shapings):
            if shaping.grammar is not None:
                allowed_V = shaping.grammar.allowed(scores_SV.shape[-1]).to(self._device)
                scores_SV[s].masked_fill_(~allowed_V, -torch.inf)
        scores_SV[broken_S] = torch.nan  # what is no number has not become one
        return logits_BV.float().index_copy(0, self._index, scores_SV)

    def _penalise(self, scores_SV: Float[Tensor, "S V"]) -> None:
        """In place, and only the tokens that have been said: of a large vocabulary they are few."""
        seen_HV, counts_HV = self._counted(scores_SV.shape[-1])
        rows_N, ids_N = seen_HV.nonzero(as_tuple=True)
        repetition_N, presence_N, frequency_N = self._penalties_H3[rows_N].T
        counts_N, places = counts_HV[rows_N, ids_N], (self._history_index[rows_N], ids_N)
        scores_N = scores_SV[places]
        scores_N = torch.where(scores_N > 0, scores_N / repetition_N, scores_N * repetition_N)
        scores_SV[places] = scores_N - frequency_N * counts_N - presence_N * (counts_N > 0)

    def _counted(self, vocabulary: int) -> tuple[Bool[Tensor, "H V"], Int[Tensor, "H V"]]:
        """The tables with all that has been said by now."""
        if self._tables is None:
            self._tables = self._stacked(vocabulary)
        seen_HV, counts_HV = self._tables
        said: list[tuple[int, int]] = []
        answered: list[tuple[int, int]] = []
        for h, history in enumerate(self._histories):
            # Some models read more tokens than they can say.
            first_of_answer = max(history.n_prompt, history.n_counted)
            said += [(h, i) for i in history.tokens[history.n_counted :] if i < vocabulary]
            answered += [(h, i) for i in history.tokens[first_of_answer:]]
            history.n_counted = len(history.tokens)
        if said:
            rows, ids = torch.tensor(said, device=self._device).T
            seen_HV[rows, ids] = True
        if answered:
            rows, ids = torch.tensor(answered, device=self._device).T
            counts_HV.index_put_((rows, ids), torch.ones_like(rows, dtype=counts_HV.dtype), accumulate=True)
        return seen_HV, counts_HV

    def _stacked(self, vocabulary: int) -> tuple[Bool[Tensor, "H V"], Int[Tensor, "H V"]]:
        """Tables of this batch, from those of the batches in which its rows were before."""
        seen_HV = torch.zeros(len(self._histories), vocabulary, dtype=torch.bool, device=self._device)
        counts_HV = torch.zeros(len(self._histories), vocabulary, dtype=torch.int32, device=self._device)
        for h, history in enumerate(self._histories):
            if history.seen_V is not None and history.counts_V is not None:
                seen_HV[h], counts_HV[h] = history.seen_V, history.counts_V
            history.seen_V, history.counts_V = seen_HV[h], counts_HV[h]
        return seen_HV, counts_HV
