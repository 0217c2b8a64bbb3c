"""One direction per stream point: between the geometric medians, which a few odd prompts do not move.

Weiszfeld's algorithm (1937; Vardi and Zhang 2000, https://doi.org/10.1073/pnas.97.4.1423): a mean in which each point
weighs the inverse of its distance from the last estimate.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.basis import unit_difference

STEPS = 64
NEAR = 1e-9
"""Of the mean distance: a point that the estimate has reached would weigh infinitely much."""


def geometric_median(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int = 1,
) -> Float[Tensor, "point 1 d_model"]:
    """Unit vectors; one per point whatever the `rank`. Zero where the medians are the same."""
    return unit_difference(median(target_NLD), median(baseline_MLD)).float()


def median(points_NLD: Float[Tensor, "prompt point d_model"]) -> Float[Tensor, "point d_model"]:
    """The point with the least sum of distances, at each stream point, float64."""
    median_LD = points_NLD.mean(dim=0, dtype=torch.float64)
    points_NLD = points_NLD.double()
    distances_NL1 = (points_NLD - median_LD).norm(dim=-1, keepdim=True)
    least_L1 = NEAR * distances_NL1.mean(dim=0) + torch.finfo(torch.float64).tiny
    for _ in range(STEPS):
        distances_NL1 = (points_NLD - median_LD).norm(dim=-1, keepdim=True)
        weights_NL1 = least_L1 / torch.maximum(distances_NL1, least_L1)
        median_LD = (weights_NL1 * points_NLD).sum(dim=0) / weights_NL1.sum(dim=0)
    return median_LD
