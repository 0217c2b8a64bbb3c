"""Which of transformers' classes a model is loaded with."""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

from bruno_ray.errors import ModelError

OTHERS = (
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
)


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads the whole model: with its vision tower where it has one.

    Raises ModelError for models that write no text.
    """
    kind = type(config)
    remote = getattr(config, "auto_map", None) or {}
    sees = getattr(config, "vision_config", None) is not None
    if sees and (kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote):
        return AutoModelForImageTextToText
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote:
        return AutoModelForCausalLM
    for mapping, found in OTHERS:
        if kind in mapping:
            return found
    raise ModelError(f"transformers has no class that writes text with a model of type {config.model_type!r}")


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether the model reads more than text, with a language model inside."""
    parts = ("vision_config", "audio_config")
    return auto_class(config) is not AutoModelForCausalLM and any(
        getattr(config, part, None) is not None for part in parts
    )


def hub_task(config: PreTrainedConfig) -> str:
    """The hub's `pipeline_tag` for a model that is loaded from this config."""
    if not is_multimodal(config):
        return "text-generation"
    if getattr(config, "audio_config", None) is None:
        return "image-text-to-text"
    return "any-to-any" if getattr(config, "vision_config", None) is not None else "audio-text-to-text"
