"""What tells one model from another: a hash of its files, and one of the tensors that were loaded from them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bruno_ray.files import file_chunks

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
IDENTITY_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model")
FULL_HASH_BYTES = 256 * 1024**2
SAMPLES = 64
"""Values of each tensor that count; one that was drawn at random differs in all of them."""


def fingerprint(source: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """``id@commit`` for the hub; for a folder ``sha256:`` over its config, tokenizer and weights.

    Folders up to FULL_HASH_BYTES of weights are hashed in full. Of bigger files the name, the size, and the first,
    the last and 14 evenly spaced megabytes count: enough to tell any two trained models apart. The chat template
    as loaded is part of it, since it changes every prompt.
    """
    folder = Path(source)
    digest = hashlib.sha256(str(tokenizer.chat_template).encode())
    if not folder.is_dir():
        return f"{source}@{_commit(source, revision)}:{digest.hexdigest()[:8]}"
    weights = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
    whole = sum(path.stat().st_size for path in weights) <= FULL_HASH_BYTES
    for path in [folder / name for name in IDENTITY_FILES if (folder / name).exists()] + weights:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        for chunk in file_chunks(path, whole or path not in weights):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _commit(source: str, revision: str | None) -> str:
    """Of the hub's repository: what was loaded lies in the cache's snapshot of it, a folder that is named after it."""
    found = try_to_load_from_cache(source, "config.json", revision=revision or "main")
    return Path(found).parent.name if isinstance(found, str) else "unknown"


@torch.no_grad()
def tensors_digest(model: nn.Module) -> str:
    """Eight hex digits over SAMPLES values of every parameter as it was loaded, wherever it lies.

    Every worker of a run must have the same: a tensor that a checkpoint lacks would be another one in each. Integers
    of packed formats are left out, since kernels may lay them out differently on other devices.
    """
    digest = hashlib.sha256()
    for name, tensor in _parameters(model):
        digest.update(f"{name}:{tuple(tensor.shape)}:".encode())
        flat = tensor.detach().reshape(-1)
        chosen = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        digest.update(flat[chosen.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters in the order of the modules; those that accelerate has offloaded from where it keeps them."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            if parameter.is_meta:
                kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
                if kept is None:
                    continue
                parameter = kept[name]
            yield f"{path}.{name}", parameter
