"""Weights that write to the residual stream, however they are stored: plain, transposed, fused, quantised."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bruno_ray.errors import ModelError

READABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Matrix:
    """One weight tensor, or one expert's slice of a fused one, seen as (d_model, in)."""

    module: nn.Module
    parameter: str
    name: str
    d_model: int
    index: int | None = None
    transposed: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the stored tensor is not the weight itself (bitsandbytes, float8 with scales and the like)."""
        stored = self._tensor()
        return stored.dtype not in READABLE_DTYPES or getattr(stored, "quant_state", None) is not None

    @property
    def device(self) -> torch.device:
        return self._tensor().device

    def numel(self) -> int:
        """Parameters, however many of them a byte holds."""
        if self.quantized and isinstance(self.module, nn.Linear):
            return self.d_model * self.module.in_features
        whole = self._tensor()
        return whole.numel() if self.index is None else whole[self.index].numel()

    def read(self) -> Float[Tensor, "d_model in"]:
        """The weight in float32, dequantised if need be. Do not write into it: it may be a view of the model.

        Of a weight that is spread over several processes all of them get the whole: all of them must ask.
        """
        weight = self._dequantized() if self.quantized else self._part(_gathered(self._tensor().detach()))
        if weight.is_meta:
            raise ModelError(
                f"{self.name} is offloaded and cannot be read: raise model.max_memory, quantise the model,"
                " or use search.norm_mode none"
            )
        return (weight.T if self.transposed else weight).float()

    def check_writable(self) -> None:
        """Raises ModelError where an edited weight cannot be stored."""
        if self.quantized:
            raise ModelError(
                f"{self.name} is quantised and cannot hold an edited weight:"
                " load the model in full precision to save it"
            )
        if hasattr(self._tensor(), "full_tensor"):
            raise ModelError(
                f"{self.name} is spread over processes and cannot be written: load the model in one to save it"
            )
        if self._tensor().is_meta:
            raise ModelError(f"{self.name} is offloaded and cannot be written: load the model on one device to save it")

    @torch.no_grad()
    def write(self, weight: Float[Tensor, "d_model in"]) -> None:
        """Cast into the stored tensor, in place."""
        self.check_writable()
        part = self._part(self._tensor().detach())
        (part.T if self.transposed else part).copy_(weight)

    def _tensor(self) -> Tensor:
        return getattr(self.module, self.parameter)

    def _part(self, stored: Tensor) -> Tensor:
        return stored if self.index is None else stored[self.index]

    def _dequantized(self) -> Tensor:
        stored = self._tensor()
        if type(stored).__name__ in ("Params4bit", "Int8Params"):
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes

            return self._part(dequantize_bnb_weight(stored, getattr(self.module, "state", None)))
        scale = getattr(self.module, f"{self.parameter}_scale_inv", None)
        if scale is not None and stored.dtype in FP8:
            scale = self._part(scale.detach()) if scale.ndim > 2 or self.index is None else scale.detach()
            return scaled(self._part(stored.detach()), scale, getattr(self.module, "block_size", None))
        raise ModelError(
            f"{self.name} is stored as {stored.dtype} in a {type(self.module).__name__}, which cannot be read:"
            " use search.norm_mode none, or an unquantised copy of the model"
        )


def _gathered(stored: Tensor) -> Tensor:
    """The whole of a DTensor (torch.distributed), which is known by its method; anything else as it is."""
    gather = getattr(stored, "full_tensor", None)
    return stored if gather is None else gather()


@dataclass(frozen=True)
class Writer:
    """Matrices whose outputs are summed into one write to the residual stream, and the module to hook for it."""

    name: str
    layer: int
    component: str
    module: nn.Module
    """Its output, or the first item of it, is (B, T, d_model) or flattened (B*T, d_model)."""

    matrices: list[Matrix]
    bias: Float[Tensor, " d_model"] | None
    """What the module adds to the output after the linear map; excluded from the edit."""

    stacked: int = 1
    """The output holds this many parts (one per expert) one after another, each for all tokens: (E*B*T, d_model)."""

    heads: int = 0
    """Attention heads whose outputs the columns of the weight are, one block after another; 0 where there are none."""

    experts: int = 0
    """The first so many matrices are experts', summed in the output; 0 where there are none, or others sum them."""

    @property
    def n_parts(self) -> int:
        """Experts or heads that can be edited without the others."""
        return self.experts or self.heads

    def chosen(self, part: Sequence[int] | None) -> list[tuple[Matrix, list[int] | None]]:
        """The matrices that some experts or heads (None: all) write with, each with their columns (None: all)."""
        if part is None or not self.n_parts:
            return [(matrix, None) for matrix in self.matrices]
        if self.experts:
            biases = self.matrices[self.experts :]  # with a column for each expert
            return [*((self.matrices[i], None) for i in part), *((matrix, list(part)) for matrix in biases)]
        (matrix,) = self.matrices
        width = matrix.numel() // matrix.d_model // self.heads
        return [(matrix, [head * width + i for head in part for i in range(width)])]

    def weights(self, part: Sequence[int] | None = None) -> "Weights":
        return Weights(self.chosen(part))

    def read_bias(self) -> Float[Tensor, " d_model"] | None:
        """The bias in float32. Raises ModelError if it is offloaded."""
        if self.bias is None:
            return None
        if self.bias.is_meta:
            raise ModelError(f"{self.name}.bias is offloaded and cannot be read: raise model.max_memory")
        return self.bias.detach().float()

    @torch.no_grad()
    def add_to_bias(self, offset: Float[Tensor, " d_model"]) -> None:
        """In place. Raises ModelError where there is none, or it is offloaded."""
        bias = self.read_bias()
        if bias is None or self.bias is None:
            raise ModelError(f"{self.name} has no bias that could hold an addition: choose a trial without one")
        self.bias.copy_(bias + offset.to(bias.device))

    @property
    def device(self) -> torch.device:
        """Where the weights lie; the CPU for offloaded ones."""
        device = self.matrices[0].device
        return torch.device("cpu") if device.type == "meta" else device


class Weights:
    """The matrices as a sequence that reads one tensor at a time: a block's experts never sit in memory in float32."""

    def __init__(self, chosen: Sequence[tuple[Matrix, list[int] | None]]) -> None:
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Float[Tensor, "d_model in"]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Float[Tensor, "d_model in"]:
        matrix, columns = self._chosen[i]
        weight = matrix.read()
        return weight if columns is None else weight[:, columns]


def scaled(
    stored: Float[Tensor, "out in"], scale: Tensor, block: tuple[int, int] | list[int] | None
) -> Float[Tensor, "out in"]:
    """An FP8 weight in float32: every block of it times its scale (DeepSeek-V3, arXiv 2412.19437, section 3.3), or one
    scale for all."""
    weight, scale = stored.float(), scale.float()
    if block is None or scale.numel() == 1:
        return weight * scale
    rows, columns = weight.shape
    return weight * scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
