"""A direction method from outside: the difference of geometric medians, which a few odd prompts do not move.

    bruno-ray run MODEL --directions.methods difference_in_means,examples/plugins/geometric_median.py:geometric_median

Weiszfeld's algorithm (1937; Vardi and Zhang 2000, https://doi.org/10.1073/pnas.97.4.1423): a mean in which each point
weighs the inverse of its distance from the last estimate.
"""

import torch
from torch import Tensor

STEPS = 32
NEAR = 1e-9
"""Of the spread: a point that the estimate has reached would weigh infinitely much."""


def geometric_median(target_NLD: Tensor, baseline_MLD: Tensor, rank: int) -> Tensor:
    """(n_layers + 1, 1, d_model): one unit direction at each point of the residual stream; zero where there is none."""
    difference_LD = _median(target_NLD) - _median(baseline_MLD)
    size_L1 = difference_LD.norm(dim=-1, keepdim=True)
    unit_LD = torch.where(size_L1 > 0, difference_LD / size_L1.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return unit_LD[:, None].float()


def _median(points_NLD: Tensor) -> Tensor:
    points_NLD = points_NLD.double()
    median_LD = points_NLD.mean(0)
    least = NEAR * (points_NLD - median_LD).norm(dim=-1).mean().clamp(min=NEAR)
    for _ in range(STEPS):
        weights_NL1 = 1 / (points_NLD - median_LD).norm(dim=-1, keepdim=True).clamp(min=least)
        median_LD = (weights_NL1 * points_NLD).sum(0) / weights_NL1.sum(0)
    return median_LD
