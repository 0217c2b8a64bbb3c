"""Every use of names that transformers keeps private, so that an upgrade of transformers breaks in one file.

Each function says what is missing in the public interface and what would replace it; ``tests/test_internals.py`` has a
test for each.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def save_as_plain(model: "PreTrainedModel") -> None:
    """Let a dequantised model be saved as one that never was quantised.

    ``save_pretrained`` undoes what loading did, and would put plain weights under the names of packed ones; read back,
    they would be random. A ``dequantize()`` that did this for formats that loading dequantises would replace it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    read = getattr(model, "_weight_conversions", None) or []
    usual = get_model_conversion_mapping(model, add_legacy=False)
    prefixes = [step for step in read if isinstance(step, PrefixChange)]
    plain = prefixes + [step for step in usual if not isinstance(step, PrefixChange)]
    object.__setattr__(model, "_weight_conversions", plain)


@cache
def mend_ragged_fp8() -> None:
    """Let FP8 weights whose sides are no multiple of the block (DeepSeek-V3's ``kv_a_proj_with_mqa`` has 576 rows) be
    dequantised with the blocks that they were quantised with.

    transformers 5.23 divides the side by the number of scales: it refuses 576 rows with 5 scales, and reads 160 rows
    with 2 scales as blocks of 80 instead of 128 and 32, which is wrong without a word. A fix there would replace this.
    """
    import torch
    from transformers.integrations import finegrained_fp8

    kind = getattr(finegrained_fp8, "Fp8Dequantize", None)
    original = getattr(kind, "_dequantize_one", None)
    if kind is None or original is None:
        return

    def dequantize_one(self: Any, quantized: "Tensor", scales: "Tensor", *arguments: Any, **keywords: Any) -> "Tensor":
        block = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
        if block and quantized.dtype == torch.float8_e4m3fn and scales.ndim >= 2:
            rows, columns = quantized.shape[-2:]
            grid = (-(-rows // block[0]), -(-columns // block[1]))
            if tuple(scales.shape[-2:]) == grid and (rows % block[0] or columns % block[1]):
                missing = (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows)
                whole = torch.nn.functional.pad(quantized.view(torch.uint8), missing).view(quantized.dtype)
                return original(self, whole, scales, *arguments, **keywords)[..., :rows, :columns].contiguous()
        return original(self, quantized, scales, *arguments, **keywords)

    kind._dequantize_one = dequantize_one
