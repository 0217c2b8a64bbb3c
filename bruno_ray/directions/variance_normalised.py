"""One direction per stream point: the difference in means, each coordinate over its spread within a side.

The diagonal form of Fisher's discriminant; as a direction to remove it is iconoclast-llm's `variance` (2026). It does
not turn towards coordinates that vary much whatever the prompt is.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.basis import unit_difference

FLOOR = 1e-2
"""Least variance of a coordinate, of the mean over all: one that hardly varies would decide alone."""


def variance_normalised(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int = 1,
) -> Float[Tensor, "point 1 d_model"]:
    """Unit vectors; one per point whatever the `rank`. Zero where both sides have the same mean."""
    target_NLD, baseline_MLD = target_NLD.double(), baseline_MLD.double()
    variance_LD = (target_NLD.var(dim=0, correction=0) + baseline_MLD.var(dim=0, correction=0)) / 2
    variance_LD = variance_LD + FLOOR * variance_LD.mean(dim=-1, keepdim=True)
    spread_LD = torch.where(variance_LD > 0, variance_LD.sqrt(), 1.0)
    return unit_difference(target_NLD.mean(dim=0), baseline_MLD.mean(dim=0), spread_LD).float()
