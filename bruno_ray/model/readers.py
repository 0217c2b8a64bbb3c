"""Weights that read the residual stream: routers, queries, keys and values, gate and up projections.

What they read has mostly been through a norm, so a direction of the stream reaches them as the norm's gain makes it.
The gain is found by asking the norm, whatever it is called and however it keeps its weight (gemma adds 1 to it).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bruno_ray.model.writers import Matrix, Weights

CENTRED = 1e-3
"""A norm takes the mean if adding 1 to what it reads changes its output by less than this share."""


@dataclass(frozen=True)
class Reader:
    """Matrices that read the same input, and the module to hook for it."""

    name: str
    layer: int
    component: str
    module: nn.Module
    """Its first argument is (B, T, d_model) or flattened (B*T, d_model)."""

    matrices: list[Matrix]
    """Seen as (d_model, out): transposed, so that an edit of the input is the edit of a writer."""

    norm: nn.Module | None
    """What the residual stream goes through before; None if nothing."""

    @property
    def device(self) -> torch.device:
        device = self.matrices[0].device
        return torch.device("cpu") if device.type == "meta" else device

    def weights(self) -> Weights:
        return Weights([(matrix, None) for matrix in self.matrices])


@torch.no_grad()
def gain(norm: nn.Module | None, d_model: int) -> tuple[Float[Tensor, " d_model"], bool]:
    """What a norm multiplies each value with, up to a factor for all (float32, on the CPU), and whether it takes the
    mean away first."""
    if norm is None:
        return torch.ones(d_model), False
    parameter = next(norm.parameters(), None)
    device, dtype = (torch.device("cpu"), torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    if device.type == "meta":  # offloaded: it is brought where it computes, and what it is given too
        device = torch.device("cpu")
    given = torch.ones(1, 1, d_model, device=device, dtype=dtype)  # of mean 0, no value 0
    given[..., 1::2] = -1
    if d_model % 2:
        given[..., -3:] = torch.tensor([1.0, 1.0, -2.0])
    there, back, moved = norm(given), norm(-given), norm(given + 1)
    centred = bool((moved - there).abs().max() < CENTRED * there.abs().max())
    return ((there - back) / (2 * given)).flatten().float().cpu(), centred  # a bias is in both
