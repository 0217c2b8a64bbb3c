"""A direction method from outside: the difference of means without the prompts that lie farthest from the others.

bruno-ray run MODEL --directions.methods difference_in_means,examples/plugins/trimmed_difference.py:trimmed_difference
"""

import torch
from torch import Tensor

LEFT_OUT = 0.2
"""Share of the prompts, at each point of the residual stream by itself."""

STEPS = 3
"""The first mean is that of all prompts, so what is farthest from it is looked for again."""


def trimmed_difference(target_NLD: Tensor, baseline_MLD: Tensor, rank: int) -> Tensor:
    """(n_layers + 1, 1, d_model): one unit direction at each point of the residual stream; zero where there is none."""
    difference_LD = _trimmed_mean(target_NLD.double()) - _trimmed_mean(baseline_MLD.double())
    size_L1 = difference_LD.norm(dim=-1, keepdim=True)
    unit_LD = torch.where(size_L1 > 0, difference_LD / size_L1.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return unit_LD[:, None].float()


def _trimmed_mean(points_NLD: Tensor) -> Tensor:
    kept = max(1, round((1 - LEFT_OUT) * len(points_NLD)))
    mean_LD = points_NLD.mean(0)
    for _ in range(STEPS):
        nearest_KL = (points_NLD - mean_LD).norm(dim=-1).argsort(dim=0)[:kept]
        mean_LD = points_NLD.gather(0, nearest_KL[..., None].expand(-1, -1, points_NLD.shape[-1])).mean(0)
    return mean_LD
