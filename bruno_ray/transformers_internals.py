"""Every use of names that transformers keeps private, so that an upgrade of transformers breaks in one file.

Each function says what is missing in the public interface and what would replace it; ``tests/test_internals.py`` has a
test for each.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class LoadedName:
    """What becomes of one stored tensor when a model class loads it."""

    name: str
    parameters: tuple[str, ...]
    """Parameters or buffers that it is all or a part of; none where the class has no place for it."""

    way: str = "as it is"
    """"as it is"; "stacked" with others along a new first axis; "transposed" in its last two axes, or "transposed to
    fit", where its shape is not that of the parameter; "converted" in another way."""


def loaded_names(model: "PreTrainedModel", names: Iterable[str]) -> Iterator[LoadedName]:
    """Stored tensors under the names that ``model``, unquantised, gives them, in the order in which they are stacked.

    transformers renames and fuses tensors while it reads them, by rules that it keeps as data. A public function from
    stored names to parameters would replace this.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        MergeModulelist,
        Transpose,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    parameters, prefix = model.state_dict(), str(model.base_model_prefix)
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        if target not in parameters:
            yield LoadedName(name, ())
        elif pattern is None:
            yield LoadedName(name, (target,))
        else:
            rule = converter_of[pattern]
            first, *_ = rule.target_patterns
            step, way = rule.operations[0], "converted"
            if len(rule.operations) == 1 and isinstance(step, MergeModulelist) and step.dim == 0:
                way = "stacked"
            elif len(rule.operations) == 1 and isinstance(step, Transpose) and {step.dim0, step.dim1} == {1, 2}:
                way = "transposed to fit" if step.check_dims else "transposed"
            yield LoadedName(name, tuple(target.replace(first, other) for other in rule.target_patterns), way)


def not_missed(model: "PreTrainedModel", names: Iterable[str]) -> list[str]:
    """Those of the parameters that a checkpoint need not have: tied ones, and those that their class calls optional.

    Only the loading report of a loaded model says so in public.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or r"(?!)")
    return [name for name in names if name in tied or optional.search(name)]


def not_unexpected(model: "PreTrainedModel", names: Iterable[str]) -> list[str]:
    """Those of the stored tensors that a checkpoint may have although the class does not load them."""
    known = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or r"(?!)")
    return [name for name in names if known.search(name)]


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
        # transformers 5.20, the last for Python 3.10, has made float32 of them by now; packed FP4 is int8.
        if block and quantized.is_floating_point() and scales.ndim >= 2:
            rows, columns = quantized.shape[-2:]
            grid = (-(-rows // block[0]), -(-columns // block[1]))
            if tuple(scales.shape[-2:]) == grid and (rows % block[0] or columns % block[1]):
                missing = (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows)
                plain = quantized.view(torch.uint8) if quantized.element_size() == 1 else quantized
                whole = torch.nn.functional.pad(plain, missing).view(quantized.dtype)
                return original(self, whole, scales, *arguments, **keywords)[..., :rows, :columns].contiguous()
        return original(self, quantized, scales, *arguments, **keywords)

    kind._dequantize_one = dequantize_one
