"""One direction per stream point: the weights of a logistic regression that tells target from baseline prompts.

Linear probes: Alain and Bengio 2016 (https://arxiv.org/abs/1610.01644). The ridge penalty of each point is the one with
the best held-out likelihood. All points, folds and penalties are fitted at once by L-BFGS, in coordinates of what the
prompts span, where the solution lies. Where the probe of a point does not tell the sides apart on prompts that it has
not seen, there is no direction, and that is said.
"""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from bruno_ray.directions.basis import centred
from bruno_ray.errors import PromptError

logger = logging.getLogger(__name__)

FOLDS = 5
PENALTIES = (1.0, 0.1, 0.01, 0.001)
"""Of half the squared weights beside the mean loss, for residuals of mean squared length 1."""

LEAST_ACCURACY = 0.65
STEPS = 100


@dataclass(frozen=True)
class Probes:
    """Probes of all points."""

    weights_LD: Float[Tensor, "point d_model"]
    accuracy_L: Float[Tensor, " point"]
    """Share of held-out prompts told rightly, mean of the two sides; 0.5 is chance."""


def supervised_probe(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int = 1,
) -> Float[Tensor, "point 1 d_model"]:
    """Unit vectors; one per point whatever the `rank`. Zero where accuracy is below ``LEAST_ACCURACY``.

    Raises PromptError with fewer than two prompts on a side: then none can be held out.
    """
    probes = fit(target_NLD, baseline_MLD)
    good_L = probes.accuracy_L >= LEAST_ACCURACY
    logger.info(
        "supervised_probe: held-out accuracy %.2f to %.2f over stream points", *torch.aminmax(probes.accuracy_L)
    )
    if not good_L.all():
        points = (~good_L).nonzero().flatten().tolist()
        logger.warning(
            "supervised_probe: accuracy below %.2f at stream points %s: no direction", LEAST_ACCURACY, points
        )
    length_L1 = probes.weights_LD.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(good_L[:, None], probes.weights_LD / length_L1, 0.0)[:, None].float()


def fit(
    target_NLD: Float[Tensor, "n_target point d_model"], baseline_MLD: Float[Tensor, "n_baseline point d_model"]
) -> Probes:
    """Probes of all prompts, and how right they are on prompts held out. See ``supervised_probe``."""
    n, m = len(target_NLD), len(baseline_MLD)
    folds = min(FOLDS, n, m)
    if folds < 2:
        raise PromptError("a supervised probe needs two prompts a side or more, to hold some out: give more")
    both_LSD = torch.stack(
        [torch.cat(centred(target_NLD[:, i], baseline_MLD[:, i])) for i in range(target_NLD.shape[1])]
    )
    scale_L = both_LSD.square().sum(dim=-1).mean(dim=-1).sqrt()
    basis_LDQ, coordinates_LQS = torch.linalg.qr(both_LSD.mT)
    inverse_L = torch.where(scale_L > 0, 1 / scale_L.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    inputs_LSQ = coordinates_LQS.mT * inverse_L[:, None, None]
    is_target_S = torch.arange(n + m) < n
    fold_S = torch.cat([torch.arange(n), torch.arange(m)]) % folds
    held_FS = fold_S == torch.arange(folds)[:, None]
    penalties_G = torch.tensor(PENALTIES, dtype=torch.float64)

    logits_FGLS = _fit_all(
        inputs_LSQ, is_target_S, ~held_FS, penalties_G[None, :, None].expand(folds, -1, len(inputs_LSQ))
    )[1]
    weight_FS = held_FS * _balanced(is_target_S, held_FS)
    loss_GL = torch.einsum("fs,fgls->gl", weight_FS, _losses(logits_FGLS, is_target_S)) / folds
    best_L = loss_GL.argmin(dim=0)
    logits_FLS = logits_FGLS[:, best_L, torch.arange(len(best_L))]
    right_FLS = ((logits_FLS > 0) == is_target_S).double() * (logits_FLS != 0) + 0.5 * (logits_FLS == 0)
    accuracy_L = torch.einsum("fs,fls->l", weight_FS, right_FLS) / folds

    everything = torch.ones(1, n + m, dtype=torch.bool)
    weights_LQ = _fit_all(inputs_LSQ, is_target_S, everything, penalties_G[best_L][None, None])[0][0, 0]
    return Probes(torch.einsum("lq,ldq->ld", weights_LQ, basis_LDQ), accuracy_L)


def _balanced(is_target_S: Bool[Tensor, " s"], used_FS: Bool[Tensor, "f s"]) -> Float[Tensor, "f s"]:
    """Weights with which both sides of what is used sum to a half."""
    sides = [used_FS & side for side in (is_target_S, ~is_target_S)]
    first, second = (side.double() / (2 * side.sum(dim=1, keepdim=True).clamp(min=1)) for side in sides)
    return first + second


def _losses(logits: Float[Tensor, "... s"], is_target_S: Bool[Tensor, " s"]) -> Float[Tensor, "... s"]:
    return softplus(torch.where(is_target_S, -logits, logits))


def _fit_all(
    inputs_LSQ: Float[Tensor, "l s q"],
    is_target_S: Bool[Tensor, " s"],
    used_FS: Bool[Tensor, "f s"],
    penalties_FGL: Float[Tensor, "f g l"],
) -> tuple[Float[Tensor, "f g l q"], Float[Tensor, "f g l s"]]:
    """Weights and logits of every problem. They share no variable, so the least sum is the least of each."""
    sample_FS = _balanced(is_target_S, used_FS)
    weights = torch.zeros(*penalties_FGL.shape, inputs_LSQ.shape[-1], dtype=torch.float64, requires_grad=True)
    offsets = torch.zeros(*penalties_FGL.shape, 1, dtype=torch.float64, requires_grad=True)

    def logits() -> Tensor:
        return torch.einsum("fglq,lsq->fgls", weights, inputs_LSQ) + offsets

    optimizer = torch.optim.LBFGS(
        [weights, offsets], max_iter=STEPS, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (sample_FS[:, None, None] * _losses(logits(), is_target_S)).sum()
        loss = loss + (penalties_FGL[..., None] * weights.square()).sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach(), logits().detach()
