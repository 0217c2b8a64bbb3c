"""How far the edited model's next tokens are from the unedited model's, on baseline prompts."""

import weakref

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bruno_ray.generation.engine import Response
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

CHUNK = 64
"""Rows of logits that are compared at a time."""


class KLDivergence:
    """KL(unedited || edited) in nats over the full vocabulary: mean, median and 95th percentile over tokens.

    Taken at the first ``scoring.kl_tokens`` positions of the unedited model's greedy answers, teacher-forced. The first
    token alone says little: an edit may leave it as it is and lead the answer astray afterwards. Its mean is a metric
    of its own, ``kl_first``, because other tools measure just that.

    Kept are the unedited logits in the model's dtype: at 100 prompts, 16 positions and a vocabulary of 128,000 in
    bfloat16 0.4 GB, on the model's device.
    """

    name = "kl_divergence"
    needs_unedited = False
    metrics = ("kl_divergence", "kl_median", "kl_p95", "kl_first")

    def __init__(self, settings: ScoringSettings):
        self._positions = settings.kl_tokens

    def prepare(self, unedited: Evaluation) -> None:
        """``unedited`` may also be of one edit, to compare others with."""
        self._prepared_on = weakref.ref(unedited)
        engine, prompts = unedited.engine, unedited.prompts.baseline_ids
        self._ids = [list(ids) for ids in prompts]
        counts = [1] * len(prompts)
        if self._positions > 1:
            for p, answer in enumerate(self._answers(unedited)):
                counts[p] = min(len(answer.token_ids) + answer.ended, self._positions)
                self._ids[p] += answer.token_ids[: counts[p] - 1]
        count_P = torch.tensor(counts)
        self._is_answer_PN: Bool[Tensor, "P N"] = torch.arange(self._positions).flip(0) < count_P[:, None]
        self._first_P = self._positions - count_P
        """Column of each prompt's first answer token; the columns before it are empty."""
        # (P, N, V), the last columns of each prompt; on the model's device, in the dtype that the model computes in.
        self._unedited_PNV = torch.empty(0)
        for _, prompt_B, logits_BNV in engine.last_logits(self._ids, unedited.edits, self._positions):
            if not len(self._unedited_PNV):
                shape = (len(self._ids), self._positions, logits_BNV.shape[-1])
                self._unedited_PNV = torch.zeros(shape, dtype=logits_BNV.dtype, device=logits_BNV.device)
            self._unedited_PNV[prompt_B, -logits_BNV.shape[1] :] = logits_BNV

    def _answers(self, unedited: Evaluation) -> list[Response]:
        """The unedited model's answers to baseline prompts, at least as far as the positions go: the evaluation's own
        where they will do."""
        if not unedited.settings.markers or unedited.settings.response_tokens < self._positions:
            return unedited.engine.generate(unedited.prompts.baseline_ids, unedited.edits, self._positions)[0]
        return unedited.whole_baseline_answers[0]

    def score(self, edited: Evaluation) -> list[Scores]:
        found = []
        for kl_PN in self.per_token(edited):
            kl_T = kl_PN[self._is_answer_PN]
            first_P = kl_PN.gather(1, self._first_P[:, None])
            found.append(
                Scores(
                    {
                        "kl_divergence": float(kl_T.mean()),
                        "kl_median": float(kl_T.quantile(0.5)),
                        "kl_p95": float(kl_T.quantile(0.95)),
                        "kl_first": float(first_P.mean()),
                    },
                    rows={self.name: tuple((kl_PN.sum(1) / self._is_answer_PN.sum(1)).tolist())},
                )
            )
        return found

    def per_token(self, edited: Evaluation) -> Float[Tensor, "K P N"]:
        """KL of each edit at each answer token of each baseline prompt, float64; 0 before the first token."""
        kl_KPN = torch.zeros(len(edited.edits), len(self._ids), self._positions, dtype=torch.float64)
        if edited is self._prepared_on():  # the unedited model against itself
            return kl_KPN
        for edit_B, prompt_B, logits_BNV in edited.engine.last_logits(self._ids, edited.edits, self._positions):
            n = logits_BNV.shape[1]
            for rows in torch.arange(len(prompt_B)).split(max(1, CHUNK // n)):
                p = prompt_B[rows]
                kl_BN = kl_of_logits(self._unedited_PNV[p, -n:], logits_BNV[rows]).cpu()
                kl_KPN[edit_B[rows], p, -n:] = torch.where(self._is_answer_PN[p, -n:], kl_BN, 0.0)
        return kl_KPN


def kl_of_logits(p: Float[Tensor, "*rows V"], q: Float[Tensor, "*rows V"]) -> Float[Tensor, " *rows"]:
    """KL(softmax p || softmax q) per row in nats, float64.

    As E_p[p - q] + log Z_q - log Z_p: exponentials in float32, sums in float64. The errors of the two normalisers
    cancel where the logits agree, so what rounding leaves is about 1e-8, and equal logits give exactly 0.
    """
    p, q = p.float(), q.float()
    high_p, high_q = p.amax(-1, keepdim=True), q.amax(-1, keepdim=True)
    exp_p = (p - high_p).exp_()
    sum_p = exp_p.sum(-1, dtype=torch.float64)
    sum_q = (q - high_q).exp_().sum(-1, dtype=torch.float64)
    apart = exp_p.mul_(p - q).masked_fill_(p == -torch.inf, 0.0).sum(-1, dtype=torch.float64) / sum_p
    shift = (high_q.double() - high_p.double())[..., 0]
    return (apart + shift + sum_q.log() - sum_p.log()).clamp(min=0)
