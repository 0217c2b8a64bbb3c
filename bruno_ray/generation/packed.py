"""Products with weights that are packed beforehand, in bfloat16 on a CPU.

oneDNN multiplies blocks of weights that lie in memory as the processor's instructions take them. Given a plain matrix
it brings it into that form at every product. With the matrices of SmolLM2 on one core of an EPYC 9004, in Gflop/s:

    rows                  1          8          40          320
    plain             9 to 21  53 to 112  126 to 187  177 to 189
    packed           15 to 48 106 to 185  184 to 216  196 to 206

The packed weights are a second copy, so they are made only where there is plenty of memory.
"""

from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]

ROWS = 64
"""Rows that packing is told to expect; with 16 and with 512 some products are a fifth slower."""

SHARE = 0.25
"""Of the free memory, which the copies may take."""


def packs(model: nn.Module) -> bool:
    """Whether the weights of ``model`` are worth packing here."""
    parameters = list(model.parameters())
    # Whether an edit was baked into a weight since it was packed cannot be seen of those that were made for inference.
    if any(p.device.type != "cpu" or p.dtype != torch.bfloat16 or p.is_inference() for p in parameters):
        return False
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in needed):
        return False
    n_bytes = sum(p.numel() * p.element_size() for p in parameters)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and n_bytes <= SHARE * psutil.virtual_memory().available


def linear(weight: Tensor, bias: Tensor | None, pack: bool) -> Map:
    """``x W^T + b``."""
    return _Packed(weight, bias) if pack else lambda x: F.linear(x, weight, bias)


def called(module: nn.Module, pack: bool) -> Map:
    """What calling ``module`` gives, its hooks included."""
    if not pack or type(module) is not nn.Linear or "forward" in vars(module):
        return module
    packed = _Packed(module.weight, module.bias)

    def with_hooks(x: Tensor) -> Tensor:
        if module._forward_hooks_with_kwargs or module._forward_pre_hooks_with_kwargs:
            return module(x)
        arguments: tuple = (x,)
        for before in module._forward_pre_hooks.values():
            changed = before(module, arguments)
            if changed is not None:
                arguments = changed if isinstance(changed, tuple) else (changed,)
        y = packed(arguments[0])
        for after in module._forward_hooks.values():
            changed = after(module, arguments, y)
            y = y if changed is None else changed
        return y

    return with_hooks


class _Packed:
    """One product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self._pack()

    def __call__(self, x: Tensor) -> Tensor:
        if self._weight._version != self._version:  # an edit was baked into it
            self._pack()
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed, self._bias, "none", [], "")

    def _pack(self) -> None:
        self._version = self._weight._version
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach().contiguous(), ROWS)
