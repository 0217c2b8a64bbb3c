"""Quantised models: those that bitsandbytes quantises here, and checkpoints that were stored quantised.

A stored checkpoint says how in its config (`quantization_config`). What transformers needs to read it right is left to
it; what is said here is only what differs between computing (as small as stored, where the device can) and saving
(dequantised, in full precision). Formats: MXFP4 (gpt-oss), FP8 with scales per block (DeepSeek-V3, Qwen3-FP8),
compressed-tensors, AWQ, GPTQ, bitsandbytes; a package that a format needs and that is missing is named.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from bruno_ray.errors import ModelError
from bruno_ray.settings import ModelSettings
from bruno_ray.transformers_internals import mend_ragged_fp8, save_as_plain

DEQUANTISED_BY_LOADING = {"mxfp4", "fp8", "compressed-tensors"}
"""Stored formats that transformers turns into plain weights while it reads them, if it is told to."""

DEQUANTISED_AFTERWARDS = {"bitsandbytes"}
"""Stored formats that are loaded as they are and then turned into plain weights."""


def stored_format(config: PreTrainedConfig) -> str | None:
    """How the checkpoint was quantised ("mxfp4", "fp8", "gptq" ...), None if it holds plain weights."""
    stored = _stored(config)
    if stored is None:
        return None
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return "bitsandbytes"
    method = stored.get("quant_method")
    return str(getattr(method, "value", method))


def loading_arguments(
    settings: ModelSettings, config: PreTrainedConfig, dtype: torch.dtype, *, full_precision: bool
) -> dict[str, Any]:
    """The keyword for `from_pretrained`: empty where there is nothing to say.

    A `quantization_config=None` must never be passed on: it overwrites the config's own, and packed weights are then
    taken for missing ones and drawn at random.

    Raises ModelError for a checkpoint that cannot be had as it is asked for.
    """
    stored, written = stored_format(config), _stored(config) or {}
    if stored is None:
        ours = None if full_precision else _bitsandbytes(settings, dtype)
        return {} if ours is None else {"quantization_config": ours}
    if settings.quantization != "none" and not full_precision:
        raise ModelError(
            f"{settings.id} is stored in {stored} already: leave model.quantization {settings.quantization} out, or"
            " give an unquantised copy"
        )
    if stored == "fp8":
        mend_ragged_fp8()
    # gpt-oss's packed experts need kernels that hide the weights from an edit's row norms; plain ones run everywhere.
    if stored == "mxfp4" or (full_precision and stored in DEQUANTISED_BY_LOADING):
        return {"quantization_config": AutoQuantizationConfig.from_dict({**written, "dequantize": True})}
    if full_precision and stored not in DEQUANTISED_AFTERWARDS:
        raise ModelError(
            f"the weights of {settings.id} are stored in {stored}, which cannot hold an edit and cannot be"
            " dequantised: set model.id to an unquantised copy to save it"
        )
    return {}


def make_plain(model: PreTrainedModel, settings: ModelSettings, stored: str) -> PreTrainedModel:
    """A checkpoint that was stored quantised as a model that never was: its config and what is saved of it say so.

    Raises ModelError if some of its weights are not plain after all.
    """
    if stored in DEQUANTISED_AFTERWARDS:
        model = model.dequantize()
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    setattr(model, "is_quantized", False)  # noqa: B010 - a class attribute that loading sets on the model
    save_as_plain(model)
    odd = next((n for n, p in model.named_parameters() if not p.is_floating_point() or p.element_size() < 2), None)
    if odd is not None:
        raise ModelError(
            f"{settings.id} is stored in {stored} and {odd} cannot be dequantised: set model.id to an unquantised copy"
            " to save it"
        )
    return model


def widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring up to ``dtype`` what was unpacked to less: transformers 5.20 makes bfloat16 of MXFP4, whatever is asked."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and 2 <= parameter.element_size() < dtype.itemsize:
            parameter.data = parameter.data.to(dtype)


def _stored(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The config's own `quantization_config`; of multimodal models it may lie with the language model."""
    for holder in (config, config.get_text_config()):
        found = getattr(holder, "quantization_config", None)
        if found is not None:
            return dict(found) if isinstance(found, dict) else found.to_dict()
    return None


def _bitsandbytes(settings: ModelSettings, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if settings.quantization == "bnb_4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if settings.quantization == "bnb_8bit" else None


def tame_bitsandbytes(model: nn.Module) -> None:
    """Work around bitsandbytes 0.50 on CPUs, and keep the log readable.

    - With AVX512-BF16 the first forward pass repacks 4-bit weights into a layout that cannot be dequantised any more.
    - The 4-bit kernel takes each row for whole blocks; if it is not, all but the first row come out wrong
      (seen: 25% error on 864 inputs instead of 9%). Better refused than measured.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            block = module.weight.quant_state.blocksize
            if module.weight.device.type == "cpu" and module.in_features % block:
                raise ModelError(
                    f"bitsandbytes cannot run {name} in 4 bit on a CPU ({module.in_features} inputs are not a multiple"
                    f" of {block}): use model.quantization bnb_8bit or none, or a GPU"
                )
        elif type(module).__name__ == "Linear8bitLt":
            # one warning per matrix product that float32 inputs are cast
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
