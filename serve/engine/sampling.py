"""The next token of every row of a batch, each in its own way, with as few operations as rows would need alone.

Greedy rows are one argmax. Sampled rows invert their cumulative distribution at a uniform number from the row's own
generator, so a seed gives the same tokens whatever else is in the batch. (Other rows may change a row's logits in
their last bits, see ``batch``; a token changes only if the number falls within that distance of a border.)

What is cut off is what transformers' warpers cut off, in their order: temperature, top_k, top_p, min_p.

Axes: B rows, S sampled rows, L rows with logprobs, C candidates, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from serve.engine.shaping import Shaper, Shaping

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
    top_k: int = 0
    """Only so many of the likeliest tokens, and those that are as likely as the last of them; 0 is all."""

    min_p: float = 0.0
    """Only tokens at least so many times as likely as the likeliest."""

    shaping: Shaping | None = None
    """What is done to its logits before; None is nothing."""

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def limited(self) -> bool:
        return self.top_k > 0 or self.min_p > 0


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
        cut = [i for i in sampled if rows[i].top_p < 1 or rows[i].limited]
        self._full = _Group(sorted({*sampled} - {*cut}), rows, device)
        self._cut = _Group(cut, rows, device)
        self._logprobs = _Group([i for i, row in enumerate(rows) if row.top_logprobs is not None], rows, device)
        shapings = [row.shaping for row in rows]
        self._shape = Shaper(shapings, device) if any(shapings) else None

    def choose(self, logits_BV: Float[Tensor, "B V"]) -> Choices:
        scores_BV = logits_BV if self._shape is None else self._shape(logits_BV)
        best_B, ids_B = scores_BV.float().max(dim=-1)
        if self._full.rows:
            ids_B[self._full.index] = self._from_all(scores_BV)
        if self._cut.rows:
            ids_B[self._cut.index] = self._from_cut(scores_BV)
        # The largest logit is no number if any of them is not, and infinite if any is.
        token_ids = torch.where(best_B.isfinite(), ids_B, -1).tolist()
        return Choices(ids_B, token_ids, self._logprobs_of(logits_BV, ids_B))

    def _from_all(self, logits_BV: Float[Tensor, "B V"]) -> Int[Tensor, " S"]:
        return _invert(self._full.probabilities(logits_BV), self._full.uniforms())

    def _from_cut(self, logits_BV: Float[Tensor, "B V"]) -> Int[Tensor, " S"]:
        """Nucleus sampling (Holtzman et al. 2020, section 3.1): the likeliest tokens that together reach top_p. Before,
        the top_k likeliest (Fan et al. 2018, section 5.1); after, those not below min_p (Nguyen et al. 2024)."""
        cut = self._cut
        probabilities_SV, uniforms_S1 = cut.probabilities(logits_BV), cut.uniforms()
        vocabulary = probabilities_SV.shape[-1]
        values_SC, ids_SC = probabilities_SV.topk(min(CANDIDATES, vocabulary))
        kept_SC = cut.among_the_likeliest(values_SC) if cut.limited else values_SC
        outside = kept_SC.cumsum(-1) - kept_SC >= cut.nucleus(kept_SC)
        if cut.limited:
            outside |= kept_SC < cut.min_p * values_SC[:, :1]
        outside[:, 0] = False
        # In the order of ids: equals may be sorted either way, but not chosen differently.
        sorted_SC, order_SC = ids_SC.sort()
        weights_SC = kept_SC.masked_fill(outside, 0).gather(-1, order_SC)
        found_S = sorted_SC.gather(-1, _invert(weights_SC, uniforms_S1)[:, None])[:, 0]
        if values_SC.shape[-1] < vocabulary:
            wide = cut.beyond(values_SC).nonzero()[:, 0]
            if len(wide):
                weights_SV = cut.wide(probabilities_SV[wide], wide)
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
        self.limited = any(batch[i].limited for i in rows)
        """Whether any row has a top_k or a min_p; without, neither is looked at."""

        if self.limited:
            self.min_p = torch.tensor([[batch[i].min_p] for i in rows], device=device)
            self._top_k = torch.tensor([[batch[i].top_k] for i in rows], device=device)

    def among_the_likeliest(self, values_SC: Float[Tensor, "S C"]) -> Float[Tensor, "S C"]:
        """Candidates, the likeliest first, without those behind the top_k-th; its equals stay."""
        n_candidates = values_SC.shape[-1]
        least_S1 = values_SC.gather(-1, (self._top_k - 1).clamp(0, n_candidates - 1))
        unlimited_S1 = (self._top_k < 1) | (self._top_k > n_candidates)
        return values_SC.where(unlimited_S1 | (values_SC >= least_S1), 0)

    def nucleus(self, kept_SC: Float[Tensor, "S C"]) -> Float[Tensor, "S 1"]:
        """The probability that a nucleus holds: top_p of what top_k has left."""
        if not self.limited:
            return self.top_p
        return self.top_p * torch.where(self._top_k > 0, kept_SC.sum(-1, keepdim=True), 1.0)

    def beyond(self, values_SC: Float[Tensor, "S C"]) -> Bool[Tensor, " S"]:
        """Rows whose choice may fall outside of the candidates."""
        wide_S1 = values_SC.sum(-1, keepdim=True) < self.top_p
        if self.limited:
            n_candidates, least_S1 = values_SC.shape[-1], values_SC[:, -1:]
            kth_S1 = values_SC.gather(-1, (self._top_k - 1).clamp(0, n_candidates - 1))
            by_k_S1 = self._top_k > 0
            past_k_S1 = by_k_S1 & ((self._top_k > n_candidates) | (least_S1 >= kth_S1))
            wide_S1 = torch.where(by_k_S1, past_k_S1, wide_S1)
            # Where min_p ends among the candidates they suffice, unless top_p is a share of what lies behind them too.
            wide_S1 &= (least_S1 >= self.min_p * values_SC[:, :1]) | (past_k_S1 & (self.top_p < 1))
        return wide_S1[:, 0]

    def wide(self, probabilities_SV: Float[Tensor, "S V"], which: Int[Tensor, " S"]) -> Float[Tensor, "S V"]:
        """What is drawn from where the candidates do not suffice: probabilities of ``which`` rows of the group, 0 for
        tokens that are cut off."""
        if not self.limited:
            return _wide_nucleus(probabilities_SV, self.top_p[which])
        top_k_S1, top_p_S1, weights_SV = self._top_k[which], self.top_p[which], probabilities_SV
        most = min(int(top_k_S1.max()), probabilities_SV.shape[-1])
        if most > 0:
            least_S1 = probabilities_SV.topk(most).values.gather(-1, (top_k_S1 - 1).clamp(0, most - 1))
            weights_SV = weights_SV.where((top_k_S1 < 1) | (weights_SV >= least_S1), 0)
        total_S1 = torch.where(top_k_S1 > 0, weights_SV.sum(-1, keepdim=True), 1.0)
        weights_SV = torch.where(top_p_S1 < 1, _wide_nucleus(weights_SV, top_p_S1 * total_S1), weights_SV)
        return weights_SV.where(weights_SV >= self.min_p[which] * probabilities_SV.amax(-1, keepdim=True), 0)

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
