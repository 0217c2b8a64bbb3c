"""The next token of every row of a batch, each in its own way, with as few operations as rows would need alone.

Greedy rows are one argmax. Sampled rows invert their cumulative distribution at a uniform number from the row's own
generator, so a seed gives the same tokens whatever else is in the batch. (Other rows may change a row's logits in
their last bits, see ``batch``; a token changes only if the number falls within that distance of a border.)

Axes: B rows, S sampled rows, L rows with logprobs, C candidates, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

GREEDY_BELOW = 1e-5  # temperatures that would only overflow
CANDIDATES = 512  # likeliest tokens that nearly always hold the nucleus: sorting the vocabulary is slow
BISECTIONS = 26  # until float32 tells nothing more apart
DRAWN = 64  # uniform numbers drawn at a time
BLOCK = 256  # columns of a distribution that are added up at a time


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a token in the model's own distribution (temperature 1), and of the likeliest."""

    token_id: int
    logprob: float | None
    """None for the first token of a text."""

    top: tuple[tuple[int, float], ...] = ()


class Uniforms:
    """Random numbers in [0, 1) of one row: a generator of its own, fresh or seeded."""

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed % 2**63)
        self._drawn: list[float] = []

    def __call__(self) -> float:
        if not self._drawn:
            self._drawn = torch.rand(DRAWN, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._drawn.pop()


@dataclass(frozen=True)
class Sampling:
    """How one row chooses."""

    temperature: float
    top_p: float
    uniforms: Uniforms
    top_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Choices:
    """The next token of every row."""

    on_device: Int[Tensor, " B"]
    token_ids: list[int]
    """-1 where the logits are not numbers."""

    logprobs: dict[int, TokenLogprob]
    """Of the rows that want them."""


class Sampler:
    """Chooses for one composition of a batch; made anew when rows come or go."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device | str) -> None:
        self._rows = rows
        sampled = [i for i, row in enumerate(rows) if not row.greedy]
        self._full = _Group([i for i in sampled if rows[i].top_p >= 1], rows, device)
        self._cut = _Group([i for i in sampled if rows[i].top_p < 1], rows, device)
        self._logprobs = _Group([i for i, row in enumerate(rows) if row.top_logprobs is not None], rows, device)

    def choose(self, logits_BV: Float[Tensor, "B V"]) -> Choices:
        best_B, ids_B = logits_BV.float().max(dim=-1)
        if self._full.rows:
            ids_B[self._full.index] = self._from_all(logits_BV)
        if self._cut.rows:
            ids_B[self._cut.index] = self._from_nucleus(logits_BV)
        # The largest logit is no number if any of them is not, and infinite if any is.
        token_ids = torch.where(best_B.isfinite(), ids_B, -1).tolist()
        return Choices(ids_B, token_ids, self._logprobs_of(logits_BV, ids_B))

    def _from_all(self, logits_BV: Float[Tensor, "B V"]) -> Int[Tensor, " S"]:
        return _invert(self._full.probabilities(logits_BV), self._full.uniforms())

    def _from_nucleus(self, logits_BV: Float[Tensor, "B V"]) -> Int[Tensor, " S"]:
        """Nucleus sampling (Holtzman et al. 2020, section 3.1): the likeliest tokens that together reach top_p."""
        probabilities_SV, uniforms_S1 = self._cut.probabilities(logits_BV), self._cut.uniforms()
        values_SC, ids_SC = probabilities_SV.topk(min(CANDIDATES, probabilities_SV.shape[-1]))
        outside = values_SC.cumsum(-1) - values_SC >= self._cut.top_p
        outside[:, 0] = False
        # In the order of ids: equals may be sorted either way, but not chosen differently.
        sorted_SC, order_SC = ids_SC.sort()
        weights_SC = values_SC.masked_fill(outside, 0).gather(-1, order_SC)
        found_S = sorted_SC.gather(-1, _invert(weights_SC, uniforms_S1)[:, None])[:, 0]
        if values_SC.shape[-1] < probabilities_SV.shape[-1]:
            wide = (values_SC.sum(-1, keepdim=True) < self._cut.top_p).nonzero()[:, 0]
            if len(wide):
                weights_SV = _wide_nucleus(probabilities_SV[wide], self._cut.top_p[wide])
                found_S[wide] = _invert(weights_SV, uniforms_S1[wide])
        return found_S

    def _logprobs_of(self, logits_BV: Tensor, ids_B: Tensor) -> dict[int, TokenLogprob]:
        group = self._logprobs
        if not group.rows:
            return {}
        tops = [self._rows[i].top_logprobs or 0 for i in group.rows]
        found = token_logprobs(logits_BV[group.index], ids_B[group.index], max(tops))
        return {
            i: TokenLogprob(entry.token_id, entry.logprob, entry.top[:n])
            for i, entry, n in zip(group.rows, found, tops)
        }


class _Group:
    """Rows of a batch that are treated alike, with their settings as columns."""

    def __init__(self, rows: list[int], batch: Sequence[Sampling], device: torch.device | str) -> None:
        self.rows = rows
        self.index = torch.tensor(rows, dtype=torch.long, device=device)
        self._sources = [batch[i].uniforms for i in rows]
        self._temperature = torch.tensor([[batch[i].temperature] for i in rows], device=device)
        self.top_p = torch.tensor([[batch[i].top_p] for i in rows], device=device)

    def probabilities(self, logits_BV: Float[Tensor, "B V"]) -> Float[Tensor, "S V"]:
        return (logits_BV[self.index].float() / self._temperature).softmax(-1)

    def uniforms(self) -> Float[Tensor, "S 1"]:
        return torch.tensor([[draw()] for draw in self._sources], dtype=torch.float64, device=self.index.device)


def token_logprobs(logits_NV: Float[Tensor, "N V"], ids_N: Int[Tensor, " N"], n_top: int) -> list[TokenLogprob]:
    """Log-probabilities of the given tokens and of the ``n_top`` likeliest, computed in float32."""
    logprobs_NV = logits_NV.float().log_softmax(-1)
    chosen = logprobs_NV.gather(-1, ids_N[:, None])[:, 0].tolist()
    if n_top == 0:
        return [TokenLogprob(token_id, logprob) for token_id, logprob in zip(ids_N.tolist(), chosen)]
    values_NK, ids_NK = logprobs_NV.topk(min(n_top, logprobs_NV.shape[-1]))
    return [
        TokenLogprob(token_id, logprob, tuple(zip(ids, values)))
        for token_id, logprob, ids, values in zip(ids_N.tolist(), chosen, ids_NK.tolist(), values_NK.tolist())
    ]


def _wide_nucleus(probabilities_SV: Float[Tensor, "S V"], top_p_S1: Float[Tensor, "S 1"]) -> Float[Tensor, "S V"]:
    """The probabilities of the nucleus, 0 elsewhere: its least one found by bisection, which is faster than sorting.

    Of tokens that are equally likely as the last one all are in.
    """
    low_S1 = torch.zeros_like(top_p_S1)
    high_S1 = probabilities_SV.amax(-1, keepdim=True)
    for _ in range(BISECTIONS):
        middle_S1 = (low_S1 + high_S1) / 2
        enough = probabilities_SV.where(probabilities_SV >= middle_S1, 0).sum(-1, keepdim=True) >= top_p_S1
        low_S1, high_S1 = torch.where(enough, middle_S1, low_S1), torch.where(enough, high_S1, middle_S1)
    return probabilities_SV.where(probabilities_SV >= low_S1, 0)


def _invert(weights_SC: Float[Tensor, "S C"], uniforms_S1: Float[Tensor, "S 1"]) -> Int[Tensor, " S"]:
    """The first column at which the cumulative weight exceeds its share u of the total.

    Found in two levels, first the block and then the column in it: sums are fast, a running sum of everything is not.
    """
    n_blocks = -(-weights_SC.shape[-1] // BLOCK)
    padded_SC = torch.nn.functional.pad(weights_SC, (0, n_blocks * BLOCK - weights_SC.shape[-1]))
    blocks_SNC = padded_SC.view(len(weights_SC), n_blocks, BLOCK)
    until_SN = blocks_SNC.sum(-1, dtype=torch.float64).cumsum(-1)
    target_S1 = uniforms_S1 * until_SN[:, -1:]
    block_S1 = torch.searchsorted(until_SN, target_S1, right=True).clamp(max=n_blocks - 1)
    inside_SC = blocks_SNC[torch.arange(len(weights_SC), device=weights_SC.device), block_S1[:, 0]].double()
    before_S1 = until_SN.gather(-1, block_S1) - inside_SC.sum(-1, keepdim=True)
    column_S1 = torch.searchsorted(inside_SC.cumsum(-1), target_S1 - before_S1, right=True)
    # Rounding may point just behind the block, or behind its last column with any weight: that one is meant.
    last_S1 = BLOCK - 1 - (inside_SC > 0).flip(-1).int().argmax(-1, keepdim=True)
    return (block_S1 * BLOCK + torch.minimum(column_S1, last_S1))[:, 0]
