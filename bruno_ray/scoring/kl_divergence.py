"""How far the edited model's next token is from the unedited model's, on baseline prompts."""

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.scoring.base import Evaluation, Scores
from bruno_ray.settings import ScoringSettings

CHUNK = 64
"""Rows of logits that are held in float64 at a time."""


class KLDivergence:
    """KL(unedited || edited) in nats over the full vocabulary: mean, median and 95th percentile over prompts.

    With ``scoring.kl_tokens`` = 1 at the first answer token. With more, at that many positions of the unedited
    model's greedy answer, teacher-forced, and a prompt's value is the mean over its positions.
    """

    name = "kl_divergence"
    needs_unedited = False
    metrics = ("kl_divergence", "kl_median", "kl_p95")

    def __init__(self, settings: ScoringSettings):
        self._positions = settings.kl_tokens

    def prepare(self, unedited: Evaluation) -> None:
        engine, prompts = unedited.engine, unedited.prompts.baseline_ids
        self._ids = [list(ids) for ids in prompts]
        self._counts_P = [1] * len(prompts)
        if self._positions > 1:
            # Without early leaving: the positions are those of the answer as it would be.
            for p, answer in enumerate(engine.generate(prompts, [None], self._positions)[0]):
                predicted = min(len(answer.token_ids) + answer.ended, self._positions)
                self._counts_P[p] = predicted
                self._ids[p] += answer.token_ids[: predicted - 1]
        # (P, N, V), the last counts_P[p] positions of each prompt; on the model's device.
        self._unedited_PNV = torch.empty(0)
        for _, prompt_B, logits_BNV in engine.last_logits(self._ids, [None], self._positions):
            if not len(self._unedited_PNV):
                shape = (len(self._ids), self._positions, logits_BNV.shape[-1])
                self._unedited_PNV = logits_BNV.new_zeros(shape)
            self._unedited_PNV[prompt_B, -logits_BNV.shape[1] :] = logits_BNV

    def score(self, edited: Evaluation) -> list[Scores]:
        kl_KP = self.per_prompt(edited)
        return [
            Scores(
                {
                    "kl_divergence": float(kl_P.mean()),
                    "kl_median": float(kl_P.quantile(0.5)),
                    "kl_p95": float(kl_P.quantile(0.95)),
                }
            )
            for kl_P in kl_KP
        ]

    def per_prompt(self, edited: Evaluation) -> Float[Tensor, "K P"]:
        """KL of each edit on each baseline prompt, float64."""
        count_P = torch.tensor(self._counts_P)
        behind_PN = torch.arange(self._positions).flip(0) < count_P[:, None]
        kl_KP = torch.zeros(len(edited.edits), len(self._ids), dtype=torch.float64)
        for edit_B, prompt_B, logits_BNV in edited.engine.last_logits(self._ids, edited.edits, self._positions):
            n = logits_BNV.shape[1]
            for rows in torch.arange(len(prompt_B)).split(max(1, CHUNK // n)):
                p = prompt_B[rows]
                kl_BN = kl_of_logits(self._unedited_PNV[p, -n:], logits_BNV[rows]).cpu()
                kl_KP[edit_B[rows], p] = torch.where(behind_PN[p, -n:], kl_BN, 0.0).sum(-1) / count_P[p]
        return kl_KP


def kl_of_logits(p: Float[Tensor, "*rows V"], q: Float[Tensor, "*rows V"]) -> Float[Tensor, " *rows"]:
    """KL(softmax p || softmax q) per row in nats, in float64: in float32 rounding alone gives about 1e-6."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -torch.inf, 0.0).sum(-1).clamp(min=0)
