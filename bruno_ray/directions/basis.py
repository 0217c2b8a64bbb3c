"""Orthonormal rows in a fixed order, with zero rows where there is nothing to normalise."""

import torch
from jaxtyping import Float
from torch import Tensor

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
