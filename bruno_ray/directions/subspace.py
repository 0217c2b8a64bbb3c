"""Several directions per stream point: the difference-in-means, then what else sets the target prompts apart.

One vector describes a behaviour that shows in one way. Where it shows in several (refusals in different words,
answer tokens that have already diverged), the target residuals also vary in directions in which the baseline ones
do not. Those come after the first direction, most pronounced first.

A direction v counts by the ratio of variances v'Tv / v'Bv, where T and B are the covariances of target and baseline
residuals without the first direction: a generalised eigenvalue problem, as in Fukunaga-Koontz contrast or common
spatial patterns. The principal directions of the target residuals alone would be those of the prompts' content,
which both sides share. An eigenvector v says how to *measure* the excess; the stream moves along the pattern T v
(Haufe et al. 2014, https://doi.org/10.1016/j.neuroimage.2013.10.067), and that is what has to be removed.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.basis import orthonormalise
from bruno_ray.directions.difference_in_means import difference_in_means

SHRINKAGE = 0.1
"""Share of an isotropic covariance mixed into the baseline's: with fewer prompts than dimensions, most directions have
no baseline variance at all. 0.1 recovered planted subspaces better than 0.5, and than a difference of covariances."""

NEGLIGIBLE = 1e-12
"""Of the largest eigenvalue: below it there is no excess, only rounding."""


def subspace(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int,
) -> Float[Tensor, "point rank d_model"]:
    """Orthonormal rows; the first is the difference-in-means. Rows that the prompts do not determine are zero."""
    first_L1D = difference_in_means(target_NLD, baseline_MLD).double()
    if rank == 1:
        return first_L1D.float()
    points = [
        _contrast_patterns(_centred(target_NLD[:, point], first_D), _centred(baseline_MLD[:, point], first_D), rank - 1)
        for point, first_D in enumerate(first_L1D[:, 0])
    ]
    return orthonormalise(torch.cat([first_L1D, torch.stack(points)], dim=1)).float()


def _centred(residuals_ND: Float[Tensor, "prompt d_model"], first_D: Float[Tensor, " d_model"]) -> Tensor:
    """Residuals in float64 without their mean and without the first direction."""
    residuals_ND = residuals_ND.double()
    residuals_ND = residuals_ND - residuals_ND.mean(dim=0)
    return residuals_ND - (residuals_ND @ first_D)[:, None] * first_D


def _contrast_patterns(
    target_ND: Float[Tensor, "n_target d_model"], baseline_MD: Float[Tensor, "n_baseline d_model"], count: int
) -> Float[Tensor, "count d_model"]:
    """Patterns of the largest variance ratios, not normalised, in the span of the prompts; zero rows if too few."""
    patterns_RD = target_ND.new_zeros(count, target_ND.shape[-1])
    scale = max(target_ND.abs().max().item(), baseline_MD.abs().max().item())
    if scale == 0:
        return patterns_RD
    target_ND, baseline_MD = target_ND / scale, baseline_MD / scale
    # Work in an orthonormal basis of what the prompts span: outside of it the target has no variance.
    basis_DK, _ = torch.linalg.qr(torch.cat([target_ND, baseline_MD]).T)
    target_NK, baseline_MK = target_ND @ basis_DK, baseline_MD @ basis_DK
    target_KK = target_NK.T @ target_NK / len(target_NK)
    baseline_KK = baseline_MK.T @ baseline_MK / len(baseline_MK)
    isotropic = max(baseline_KK.trace().item(), 1e-6 * target_KK.trace().item()) / target_ND.shape[-1]
    identity_KK = torch.eye(len(baseline_KK), dtype=torch.float64, device=baseline_KK.device)
    baseline_KK = (1 - SHRINKAGE) * baseline_KK + SHRINKAGE * isotropic * identity_KK
    # T v = w B v with B = C C': an ordinary symmetric problem in u = C' v, and T v is along B v = C u
    cholesky_KK = torch.linalg.cholesky(baseline_KK)
    whitened_KK = torch.linalg.solve_triangular(cholesky_KK, target_KK, upper=False)
    whitened_KK = torch.linalg.solve_triangular(cholesky_KK, whitened_KK.T, upper=False)
    ratios_K, vectors_KK = torch.linalg.eigh((whitened_KK + whitened_KK.T) / 2)
    found = min(count, int((ratios_K > NEGLIGIBLE * ratios_K[-1].abs().clamp(min=NEGLIGIBLE)).sum()))
    leading_KR = vectors_KK.flip(dims=[1])[:, :found]
    patterns_RD[:found] = (basis_DK @ cholesky_KK @ leading_KR).T
    return patterns_RD
