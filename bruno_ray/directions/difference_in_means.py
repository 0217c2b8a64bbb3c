"""One direction per stream point: from the baseline mean to the target mean."""

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.basis import unit_difference


def difference_in_means(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int = 1,
) -> Float[Tensor, "point 1 d_model"]:
    """Unit vectors; one per point whatever the `rank`. Zero where both sides have the same mean.

    Arditi et al. 2024, section 2.3 (https://arxiv.org/abs/2406.11717). In float64: what both sides share is large
    and cancels here.
    """
    target_LD = target_NLD.mean(dim=0, dtype=torch.float64)
    baseline_LD = baseline_MLD.mean(dim=0, dtype=torch.float64)
    return unit_difference(target_LD, baseline_LD).float()
