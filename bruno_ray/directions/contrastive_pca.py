"""Several directions per stream point: in which target prompts depart from the baseline mean more than baseline do.

Contrastive PCA (Abid et al. 2018, https://doi.org/10.1038/s41467-018-04608-8), with the second moment of *both* sides
about the baseline mean. Centred on its own mean each side would lose the shift between the means, which is most of
what a behaviour is (bruno did that: the first component was nearly orthogonal to it).

Dual form: the directions lie in the span of the prompts, so the matrix is as large as the smaller of d_model and the
number of prompts.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.basis import centred

ALPHA = 1.0
"""Weight of what baseline prompts vary in."""

LEAST_SHARE = 0.05
"""Directions whose eigenvalue is a smaller share of the largest are left out. A share has no unit: residuals of another
scale give the same directions."""


def contrastive_pca(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int,
) -> Float[Tensor, "point rank d_model"]:
    """Orthonormal rows, most pronounced first, each towards the target mean; zero where there are no more."""
    points = [_components(*centred(target_NLD[:, i], baseline_MLD[:, i]), rank) for i in range(target_NLD.shape[1])]
    return torch.stack(points).float()


def _components(
    target_ND: Float[Tensor, "n_target d_model"], baseline_MD: Float[Tensor, "n_baseline d_model"], rank: int
) -> Float[Tensor, "rank d_model"]:
    rows_RD = target_ND.new_zeros(rank, target_ND.shape[-1])
    scale = max(target_ND.abs().max(), baseline_MD.abs().max())
    if scale == 0:
        return rows_RD
    n, m = len(target_ND), len(baseline_MD)
    both_KD = torch.cat([target_ND / n**0.5, baseline_MD * (ALPHA / m) ** 0.5]) / scale
    sign_K = torch.cat([both_KD.new_ones(n), -both_KD.new_ones(m)])
    basis_DQ, coordinates_QK = torch.linalg.qr(both_KD.T)
    shares_Q, vectors_QQ = torch.linalg.eigh((coordinates_QK * sign_K) @ coordinates_QK.T)
    shares_Q, vectors_QQ = shares_Q.flip(0), vectors_QQ.flip(1)
    found = min(rank, int((shares_Q > LEAST_SHARE * shares_Q[0].clamp(min=0)).sum()))
    directions_RD = (basis_DQ @ vectors_QQ[:, :found]).T
    towards_R = directions_RD @ target_ND.mean(dim=0)
    rows_RD[:found] = torch.where(towards_R < 0, -1.0, 1.0)[:, None] * directions_RD
    return rows_RD
