"""vLLM's load format ``bruno_ray``: the base model's weights, read by vLLM as it reads that model, under an edit.

The folder that is served (`bruno-ray export RUN --to vllm FOLDER`) has config.json, the tokenizer and the edit, but no
weights. So vLLM cannot serve it unedited by mistake: without this load format it finds nothing to load.

Hooks are there before the model runs for the first time, hence before it is compiled and before CUDA graphs are
captured; both hold them. vLLM names its cache of compiled models after the config, in which the edit's digest is.
"""

import copy
import hashlib
import logging
import os
from typing import Any

from safetensors.torch import load_file
from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.config import replace as replaced
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from bruno_ray_vllm.hooks import attach, edits_of

logger = logging.getLogger("vllm.bruno_ray")  # below vLLM's own, which is shown

ENTRY = "bruno_ray"
"""Of config.json."""

FORMAT = 1
"""Of that entry; goes up when a folder of before cannot be read any more."""

OPTIONS = ("base", "load_format")


class EditedModelLoader(BaseModelLoader):
    """``--model-loader-extra-config`` takes `base` (the base model's folder or hub id, where the folder names none, or
    to use another copy) and `load_format` (how vLLM reads that, `auto` if not given); the rest is for that format."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        extra = dict(load_config.model_loader_extra_config or {})
        self._base, load_format = (extra.pop(option, None) for option in OPTIONS)
        self._inner = get_model_loader(
            replaced(load_config, load_format=load_format or "auto", model_loader_extra_config=extra)
        )

    def download_model(self, model_config: ModelConfig) -> None:
        self._inner.download_model(self._of_base(model_config))

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self._inner.load_weights(model, self._of_base(model_config))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, **others: Any) -> nn.Module:
        """Raises ValueError if the folder holds no edit, or one that does not fit."""
        base = self._of_base(model_config)
        if vllm_config.lora_config is not None:
            raise ValueError("adapters and an edit cannot be served together: vLLM computes adapters past the hooks")
        entry = None if _is_draft(vllm_config, model_config) else _entry(model_config)
        model = self._inner.load_model(vllm_config=vllm_config, model_config=base, **others)
        if entry is None:
            return model
        hooked = attach(model, edits_of(load_file(_checked(model_config.model, entry))))
        logger.info(
            "%s: trial %s of %s on %s, %d modules edited", ENTRY, entry["trial"], entry["run"], base.model, len(hooked)
        )
        return model

    def _of_base(self, model_config: ModelConfig) -> ModelConfig:
        """The same model with its weights where the base's are."""
        entry = getattr(model_config.hf_config, ENTRY, None)
        if entry is None:  # a draft model of its own
            return model_config
        where = self._base or entry["base"]
        if where is None:
            raise ValueError(
                f"{model_config.model} does not say where its base model {entry['base_name']} is: give"
                """ --model-loader-extra-config '{"base": "FOLDER"}'"""
            )
        changed = copy.copy(model_config)
        changed.model, changed.revision = where, None if self._base else entry["revision"]
        return changed


def _is_draft(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Whether the model only proposes tokens, which the edited one accepts or not."""
    speculative = vllm_config.speculative_config
    return speculative is not None and model_config is speculative.draft_model_config


def _entry(model_config: ModelConfig) -> dict[str, Any]:
    entry = getattr(model_config.hf_config, ENTRY, None)
    if entry is None:
        raise ValueError(f"{model_config.model} holds no edit of bruno-ray: serve it without --load-format {ENTRY}")
    if entry["format"] != FORMAT:
        raise ValueError(
            f"{model_config.model} has format {entry['format']} and this plug-in reads {FORMAT}: install the plug-in"
            " of the bruno-ray that wrote it"
        )
    return entry


def _checked(folder: str, entry: dict[str, Any]) -> str:
    """The file with the edit, if it is the one that config.json speaks of."""
    file = os.path.join(_local(folder), entry["file"])
    with open(file, "rb") as content:
        digest = hashlib.sha256(content.read()).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(f"{file} is not the file that {folder}/config.json speaks of: export it again")
    return file


def _local(folder: str) -> str:
    if os.path.isdir(folder):
        return folder
    from huggingface_hub import snapshot_download

    return snapshot_download(folder, allow_patterns=["*.json", "*.safetensors"])
