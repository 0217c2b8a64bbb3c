"""Orthonormal rows in a fixed order, with zero rows where there is nothing to normalise."""

import torch
from jaxtyping import Float
from torch import Tensor

INDISTINCT = 1e-9  # of the residuals' length: a smaller difference is rounding, not a difference
LEAST_LEFT = 0.2  # of a vector's length: with less left, the rows before it say it all
NEGLIGIBLE = 1e-6  # of its own length: what Gram-Schmidt leaves of a row that depends on those before it


def orthonormalise(rows_LRD: Float[Tensor, "point rank d_model"]) -> Float[Tensor, "point rank d_model"]:
    """Gram-Schmidt per point, in float64, keeping the order; dependent and zero rows become zero.

    Not QR: it may flip signs, and it fills a dependent row up with an arbitrary direction.
    """
    rows_LRD = rows_LRD.double()
    basis: list[Tensor] = []
    for row_LD in rows_LRD.unbind(dim=1):
        length_L1 = row_LD.norm(dim=-1, keepdim=True)
        row_LD = row_LD / length_L1.clamp(min=torch.finfo(torch.float64).tiny)
        rest_LD = row_LD
        for _ in range(2):  # once leaves rounding errors of the size that was removed ("twice is enough")
            for earlier_LD in basis:
                rest_LD = rest_LD - (rest_LD * earlier_LD).sum(dim=-1, keepdim=True) * earlier_LD
        rest_L1 = rest_LD.norm(dim=-1, keepdim=True)
        unit_LD = rest_LD / rest_L1.clamp(min=NEGLIGIBLE)
        basis.append(torch.where(rest_L1 > NEGLIGIBLE, unit_LD, torch.zeros_like(unit_LD)))
    return torch.stack(basis, dim=1)


def unit_difference(
    target_LD: Float[Tensor, "point d_model"],
    baseline_LD: Float[Tensor, "point d_model"],
    spread_LD: Float[Tensor, "point d_model"] | None = None,
) -> Float[Tensor, "point 1 d_model"]:
    """From a centre of the baseline residuals to one of the target's, float64; zero where they are the same.

    With a spread, each coordinate of the difference over it.
    """
    difference_LD = target_LD - baseline_LD
    scale_L1 = torch.maximum(target_LD.norm(dim=-1, keepdim=True), baseline_LD.norm(dim=-1, keepdim=True))
    distinct_L1 = difference_LD.norm(dim=-1, keepdim=True) > INDISTINCT * scale_L1
    if spread_LD is not None:
        difference_LD = difference_LD / spread_LD
    length_L1 = difference_LD.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(distinct_L1, difference_LD / length_L1, 0.0)[:, None]


def centred(
    target_ND: Float[Tensor, "n_target d_model"], baseline_MD: Float[Tensor, "n_baseline d_model"]
) -> tuple[Float[Tensor, "n_target d_model"], Float[Tensor, "n_baseline d_model"]]:
    """Both about the baseline mean, in float64; zeros where all prompts have the same residual but for rounding."""
    target_ND, baseline_MD = target_ND.double(), baseline_MD.double()
    middle_D = baseline_MD.mean(dim=0)
    about = target_ND - middle_D, baseline_MD - middle_D
    rounding = INDISTINCT * middle_D.norm()
    if max(side.norm(dim=-1).max() for side in about) <= rounding:
        return torch.zeros_like(about[0]), torch.zeros_like(about[1])
    return about


def spanning(
    vectors_KD: Float[Tensor, "vector d_model"], counts_K: Float[Tensor, " vector"], rank: int
) -> Float[Tensor, "rank d_model"]:
    """Orthonormal rows that span vectors, each of which stands for a number of prompts: in every step the vector of
    which most is left, its length weighted by the root of its count. One of which less than ``LEAST_LEFT`` is left
    adds nothing; rows after the last are zero."""
    rows_RD = vectors_KD.new_zeros(rank, vectors_KD.shape[-1])
    lengths_K = vectors_KD.norm(dim=-1)
    rest_KD = vectors_KD
    for row in range(rank):
        left_K = rest_KD.norm(dim=-1)
        weight_K = torch.where(left_K > LEAST_LEFT * lengths_K, left_K * counts_K.sqrt(), 0.0)
        chosen = int(weight_K.argmax())
        if weight_K[chosen] == 0:
            break
        rows_RD[row] = orthonormalise(torch.cat([rows_RD[:row], rest_KD[chosen][None]])[None])[0, -1]
        rest_KD = rest_KD - (rest_KD @ rows_RD[row])[:, None] * rows_RD[row]
    return rows_RD
