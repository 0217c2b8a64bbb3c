"""Where in the residual stream target and baseline prompts lie apart: numbers and pictures for the report.

Directions are never judged on the prompts they come from. In thousands of dimensions the difference-in-means of a few
hundred prompts separates *any* two groups of them; so prompts are split in two halves, and each half is projected on
the direction of the other (two-fold cross-fitting). For two samples of one distribution the effect size is then
around 0 and the AUROC around 0.5.

Shapes: N, M prompts; L stream points; D = d_model.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.difference_in_means import difference_in_means


@dataclass(frozen=True)
class PointGeometry:
    """One stream point; 0 is the embedding output, l + 1 the residual stream after block l."""

    point: int

    target_norm: float
    """Length of the target mean."""

    baseline_norm: float

    difference_norm: float
    """Distance of the means."""

    cosine: float
    """Between target and baseline mean."""

    effect_size: float
    """Cohen's d along the cross-fitted direction: distance of the means in pooled standard deviations."""

    auroc: float
    """Chance that a target prompt lies further along the cross-fitted direction than a baseline prompt."""

    silhouette: float
    """Mean silhouette of the two groups, Euclidean, -1 to 1 (Rousseeuw 1987)."""


@dataclass(frozen=True)
class PrincipalPlane:
    """Both groups in the plane of the two leading principal components of all prompts, per stream point."""

    target_NL2: Float[Tensor, "n_target point 2"]
    baseline_ML2: Float[Tensor, "n_baseline point 2"]
    explained_L2: Float[Tensor, "point 2"]
    """Share of the variance along each axis."""


def point_geometry(
    target_NLD: Float[Tensor, "n_target point d_model"], baseline_MLD: Float[Tensor, "n_baseline point d_model"]
) -> list[PointGeometry]:
    """One row per stream point. Effect size and AUROC are 0 and 0.5 with fewer than 4 prompts on a side."""
    target_LD = target_NLD.mean(dim=0, dtype=torch.float64)
    baseline_LD = baseline_MLD.mean(dim=0, dtype=torch.float64)
    cosine_L = torch.nn.functional.cosine_similarity(target_LD, baseline_LD, dim=-1)
    target_NL, baseline_ML = cross_fitted_projections(target_NLD, baseline_MLD)
    return [
        PointGeometry(
            point=point,
            target_norm=target_LD[point].norm().item(),
            baseline_norm=baseline_LD[point].norm().item(),
            difference_norm=(target_LD[point] - baseline_LD[point]).norm().item(),
            cosine=cosine_L[point].item(),
            effect_size=effect_size(target_NL[:, point], baseline_ML[:, point]),
            auroc=auroc(target_NL[:, point], baseline_ML[:, point]),
            silhouette=silhouette(target_NLD[:, point], baseline_MLD[:, point]),
        )
        for point in range(target_NLD.shape[1])
    ]


def cross_fitted_projections(
    target_NLD: Float[Tensor, "n_target point d_model"], baseline_MLD: Float[Tensor, "n_baseline point d_model"]
) -> tuple[Float[Tensor, "n_target point"], Float[Tensor, "n_baseline point"]]:
    """Each prompt's coordinate along the difference-in-means of the half that it is not in; even and odd prompts.

    Coordinates are relative to the middle between the other half's means, so that both halves share one origin.
    """
    projections = (
        torch.zeros(target_NLD.shape[:2], dtype=torch.float64),
        torch.zeros(baseline_MLD.shape[:2], dtype=torch.float64),
    )
    if min(len(target_NLD), len(baseline_MLD)) < 4:
        return projections
    for half in (0, 1):
        target_fit, baseline_fit = target_NLD[1 - half :: 2], baseline_MLD[1 - half :: 2]
        direction_LD = difference_in_means(target_fit, baseline_fit)[:, 0].double()
        middle_LD = (target_fit.mean(dim=0, dtype=torch.float64) + baseline_fit.mean(dim=0, dtype=torch.float64)) / 2
        for projection_NL, residuals_NLD in zip(projections, (target_NLD, baseline_MLD)):
            rest_NLD = residuals_NLD[half::2].double() - middle_LD
            projection_NL[half::2] = torch.einsum("nld,ld->nl", rest_NLD, direction_LD)
    return projections


def effect_size(target_N: Float[Tensor, " n_target"], baseline_M: Float[Tensor, " n_baseline"]) -> float:
    """Cohen's d: difference of the means over the pooled standard deviation; 0 where nothing varies."""
    n, m = len(target_N), len(baseline_M)
    if n < 2 or m < 2:
        return 0.0
    pooled = ((n - 1) * target_N.double().var() + (m - 1) * baseline_M.double().var()) / (n + m - 2)
    if pooled <= 0:
        return 0.0
    return ((target_N.double().mean() - baseline_M.double().mean()) / pooled.sqrt()).item()


def auroc(target_N: Float[Tensor, " n_target"], baseline_M: Float[Tensor, " n_baseline"]) -> float:
    """Area under the ROC curve of telling target from baseline by a threshold; ties count half."""
    sorted_M, target_N = baseline_M.contiguous().sort().values, target_N.contiguous()
    below_N = torch.searchsorted(sorted_M, target_N).double()
    not_above_N = torch.searchsorted(sorted_M, target_N, right=True).double()
    return ((below_N + not_above_N) / 2).mean().item() / len(baseline_M)


def silhouette(target_ND: Float[Tensor, "n_target d_model"], baseline_MD: Float[Tensor, "n_baseline d_model"]) -> float:
    """Mean silhouette coefficient of the two groups; 0 where a group has fewer than two prompts."""
    n, m = len(target_ND), len(baseline_MD)
    if n < 2 or m < 2:
        return 0.0
    points = torch.cat([target_ND, baseline_MD]).double()
    points = points - points.mean(dim=0)  # far from the origin, the products below would lose the digits that matter
    products = points @ points.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0).fill_diagonal_(0).sqrt()
    to_target, to_baseline = distances[:, :n].sum(dim=1), distances[:, n:].sum(dim=1)
    is_target = torch.arange(n + m) < n
    own = torch.where(is_target, to_target / (n - 1), to_baseline / (m - 1))  # the distance to itself is 0
    other = torch.where(is_target, to_baseline / m, to_target / n)
    larger = torch.maximum(own, other)
    return torch.where(larger > 0, (other - own) / larger.clamp(min=torch.finfo(torch.float64).tiny), 0.0).mean().item()


def principal_plane(
    target_NLD: Float[Tensor, "n_target point d_model"], baseline_MLD: Float[Tensor, "n_baseline point d_model"]
) -> PrincipalPlane:
    """PCA of all prompts together at each stream point. Signs: the target mean is at the positive side of each axis."""
    n, n_points = len(target_NLD), target_NLD.shape[1]
    coordinates_KL2 = torch.zeros(n + len(baseline_MLD), n_points, 2)
    explained_L2 = torch.zeros(n_points, 2)
    for point in range(n_points):
        points_KD = torch.cat([target_NLD[:, point], baseline_MLD[:, point]]).double()
        points_KD = points_KD - points_KD.mean(dim=0)
        # The Gram matrix is prompts x prompts, far smaller than d_model x d_model or an SVD of the residuals.
        variance_K, vectors_KK = torch.linalg.eigh(points_KD @ points_KD.T)
        for axis in range(min(2, len(variance_K))):
            length = variance_K[-1 - axis].clamp(min=0).sqrt()
            coordinates_K = length * vectors_KK[:, -1 - axis]
            sign = -1.0 if coordinates_K[:n].sum() < 0 else 1.0
            coordinates_KL2[:, point, axis] = (sign * coordinates_K).float()
            if variance_K.sum() > 0:
                explained_L2[point, axis] = (length**2 / variance_K.clamp(min=0).sum()).float()
    return PrincipalPlane(coordinates_KL2[:n], coordinates_KL2[n:], explained_L2)
