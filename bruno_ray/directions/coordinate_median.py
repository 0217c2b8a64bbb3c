"""One direction per stream point: between the medians of each coordinate."""

from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.basis import unit_difference


def coordinate_median(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int = 1,
) -> Float[Tensor, "point 1 d_model"]:
    """Unit vectors; one per point whatever the `rank`. Zero where the medians are the same.

    Up to half of the prompts may be odd ones. It depends on the choice of coordinates, which the massive activations of
    some models single out (Sun et al. 2024, https://arxiv.org/abs/2402.17762).
    """
    return unit_difference(_median(target_NLD), _median(baseline_MLD)).float()


def _median(points_NLD: Float[Tensor, "prompt point d_model"]) -> Float[Tensor, "point d_model"]:
    """The mean of the two middle values where their number is even; torch takes the lower one."""
    sorted_NLD = points_NLD.double().sort(dim=0).values
    n = len(sorted_NLD)
    return (sorted_NLD[(n - 1) // 2] + sorted_NLD[n // 2]) / 2
