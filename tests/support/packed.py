"""Checkpoints in published packed formats, written from their specifications, with the weights that they stand for.

    true = packed.fp8(folder)        # rewrites the folder's weights; returns name -> float32 tensor as it must be read

Nothing here comes from transformers, so that what it reads is held against an independent writer.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8_MAX = 448.0
"""Largest number of float8_e4m3fn."""

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3); bit 3 is the sign."""

MX_BLOCK = 32
MX_BIAS = 127


def fp8(folder: Path, block: int = 128) -> dict[str, Tensor]:
    """Linear weights as float8 with a scale per block of ``block`` x ``block``, as DeepSeek-V3 and Qwen3-FP8 have them
    (arXiv 2412.19437, section 3.3: ``weight`` and ``weight_scale_inv``)."""
    true, stored = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        true[name] = stored[name] = weight
        if weight.ndim == 2 and name.endswith("proj.weight"):
            rows, columns = weight.shape
            scale = torch.ones(-(-rows // block), -(-columns // block))
            packed = torch.empty_like(weight)
            for i, j in [(i, j) for i in range(scale.shape[0]) for j in range(scale.shape[1])]:
                part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                scale[i, j] = weight[part].abs().max() / FP8_MAX
                packed[part] = weight[part] / scale[i, j]
            stored[name] = packed.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            true[name] = torch.empty_like(weight)
            for i, j in [(i, j) for i in range(scale.shape[0]) for j in range(scale.shape[1])]:
                part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                true[name][part] = stored[name][part].float() * scale[i, j]
    _rewrite(
        folder, stored, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    )
    return true


def mxfp4(folder: Path) -> dict[str, Tensor]:
    """Experts as 4-bit numbers in blocks of 32 with a power of two each, as gpt-oss has them: ``*_blocks`` of shape
    (E, out, in / 32, 16), low nibble first, and ``*_scales`` (E, out, in / 32); biases stay as they are."""
    true, stored = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        true[name] = stored[name] = weight
        if name.endswith((".down_proj", ".gate_up_proj")):
            rows = weight.transpose(1, 2).contiguous()  # (E, in, out) in memory, (E, out, in) in the file
            blocks = rows.reshape(*rows.shape[:2], -1, MX_BLOCK)
            exponent = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
            scaled = blocks / torch.exp2(exponent)[..., None]
            code = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
            code = torch.where(scaled < 0, code + 8, code)
            del stored[name]
            stored[f"{name}_blocks"] = (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8)
            stored[f"{name}_scales"] = (exponent + MX_BIAS).to(torch.uint8)
            value = FP4[code % 8] * torch.where(code >= 8, -1.0, 1.0) * torch.exp2(exponent)[..., None]
            true[name] = value.reshape(rows.shape).transpose(1, 2).contiguous()
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _rewrite(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return true


def gptq(folder: Path) -> None:
    """Only the names and shapes of GPTQ's tensors: for what must be refused where its package is missing."""
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            stem, (rows, columns) = name.removesuffix(".weight"), weight.shape
            stored[f"{stem}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
            stored[f"{stem}.qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
            stored[f"{stem}.scales"] = torch.ones(1, rows, dtype=torch.float16)
            stored[f"{stem}.g_idx"] = torch.zeros(columns, dtype=torch.int32)
        else:
            stored[name] = weight
    _rewrite(folder, stored, {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True})


def _rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, object]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
