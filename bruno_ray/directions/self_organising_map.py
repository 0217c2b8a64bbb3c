"""Several directions per stream point: from the baseline mean to the neurons of a map of the target residuals.

Piras et al. 2025 (https://arxiv.org/abs/2511.08379), who choose among the neurons by a search; here a few are taken
that span most of them. Kohonen's map in its batch form (1990): each neuron is the mean of the prompts near it, where
near is measured on the grid and narrows. It starts on the plane of the first two principal axes: no chance is in it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.basis import centred, spanning

LARGEST_SIDE = 4
PROMPTS_PER_NEURON = 10
STEPS = 40
LAST_WIDTH = 0.3


def self_organising_map(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int,
) -> Float[Tensor, "point rank d_model"]:
    """Orthonormal rows that span the neurons, those of most prompts first; zero where there are no more.

    With a rank above the number of kinds, the last rows are what neurons of one kind differ in, which may be chance.
    """
    points = []
    for point in range(target_NLD.shape[1]):
        target_ND, _ = centred(target_NLD[:, point], baseline_MLD[:, point])
        neurons_KD, counts_K = _map(target_ND)
        points.append(spanning(neurons_KD, counts_K, rank))
    return torch.stack(points).float()


def _map(target_ND: Float[Tensor, "n_target d_model"]) -> tuple[Float[Tensor, "k d_model"], Float[Tensor, " k"]]:
    """Neurons, and how many prompts are nearest to each."""
    side = min(LARGEST_SIDE, max(1, int((len(target_ND) / PROMPTS_PER_NEURON) ** 0.5)))
    steps = torch.arange(side, dtype=torch.float64)
    grid_K2 = torch.cartesian_prod(steps, steps)
    mean_D = target_ND.mean(dim=0)
    _, widths, axes_AD = torch.linalg.svd(target_ND - mean_D, full_matrices=False)
    spread_A = widths[:2] / len(target_ND) ** 0.5
    place_K2 = 2 * grid_K2 / max(side - 1, 1) - (1.0 if side > 1 else 0.0)
    neurons_KD = mean_D + (place_K2[:, : len(spread_A)] * spread_A) @ axes_AD[:2]
    apart_KK = torch.cdist(grid_K2, grid_K2)
    for step in range(STEPS):
        width = max(side / 2, LAST_WIDTH) * (LAST_WIDTH / max(side / 2, LAST_WIDTH)) ** (step / (STEPS - 1))
        nearest_N = torch.cdist(target_ND, neurons_KD).argmin(dim=1)
        near_NK = torch.exp(-apart_KK[nearest_N].square() / (2 * width**2))
        total_K1 = near_NK.sum(dim=0)[:, None]
        moved_KD = near_NK.T @ target_ND / total_K1.clamp(min=torch.finfo(torch.float64).tiny)
        neurons_KD = torch.where(total_K1 > 1e-6, moved_KD, neurons_KD)
    nearest_N = torch.cdist(target_ND, neurons_KD).argmin(dim=1)
    return neurons_KD, nearest_N.bincount(minlength=len(neurons_KD)).double()
