"""Load a chat model: dtype fallback, quantisation, devices, and one clear line for everything that can go wrong.

    loaded = load_model(ModelSettings(id="Qwen/Qwen3-0.6B"))
    loaded.model, loaded.tokenizer, loaded.architecture

The tokenizer pads on the left, always: every reader of the last position relies on it. The model is in eval mode
without gradients, its generation config neutral (greedy, no penalties); what the model came with is kept in
``generation_config`` for saving.
"""

import logging
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import Architecture, find_architecture
from bruno_ray.model.batching import input_device
from bruno_ray.model.classes import is_multimodal
from bruno_ray.model.families import in_table, require_known
from bruno_ray.model.identity import fingerprint, tensors_digest
from bruno_ray.model.loading_errors import explained, named
from bruno_ray.model.locating import locate
from bruno_ray.model.probed import probed_architecture
from bruno_ray.model.weights import load_weights
from bruno_ray.settings import ModelSettings

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """One copy of a model and what belongs to it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    """Of multimodal models; only needed to save them."""

    architecture: Architecture
    dtype: str
    """What the weights (of a quantised model: the rest) are in: "bfloat16", "float16" or "float32"."""

    fingerprint: str
    """Changes with weights (as stored, and as loaded), tokenizer, chat template, dtype and quantisation."""

    device: torch.device
    """Where inputs go."""

    generation_config: GenerationConfig
    """As the model came; ``model.generation_config`` is neutral."""

    lean_forward: bool = True
    """Whether engines may compute with a forward pass of their own."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: of the generation config and of the tokenizer."""
        found = self.generation_config.eos_token_id
        ids = found if isinstance(found, list) else [found]
        return tuple(dict.fromkeys(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None))


def load_model(settings: ModelSettings, *, full_precision: bool = False, only_look: bool = False) -> LoadedModel:
    """Load what the settings say. Raises ModelError with one line that says what to do.

    ``full_precision`` is for baking and saving: unquantised, in the dtype it is stored in, on the CPU. ``only_look``
    is for showing what an edit would reach: a model that has to be probed is probed without being accepted for it.
    """
    source = locate(settings).id
    common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **common)
        require_known(config, settings.id)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **common)
        processor = _load_processor(source, common) if is_multimodal(config) else None
    except Exception as error:
        raise explained(error, settings) from error
    _prepare_tokenizer(tokenizer, processor, settings)
    if full_precision:
        settings = settings.model_copy(update={"dtypes": ("auto",), "quantization": "none", "device_map": "cpu"})
    model, dtype = load_weights(source, settings, config, tokenizer, full_precision=full_precision)
    identity = fingerprint(source, settings.revision, tokenizer)
    if in_table(config):
        architecture = find_architecture(model)
    else:
        architecture = probed_architecture(model, settings, identity, only_look=only_look)
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    generation_config = deepcopy(model.generation_config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=generation_config.bos_token_id,
        eos_token_id=generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        architecture=architecture,
        dtype=dtype,
        fingerprint=f"{identity}:{settings.quantization}:{dtype}:{tensors_digest(model)}",
        device=input_device(architecture.embedding),
        generation_config=generation_config,
        lean_forward=settings.lean_forward != "off",
    )


def _contiguous(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What comes to the output embeddings in one piece. torch multiplies a part of a tensor, such as the last tokens of
    every row, with a copy of the whole vocabulary's weights per row."""
    return (arguments[0].contiguous(), *arguments[1:])


# ----- tokenizer and processor -----


def _load_processor(source: str, common: dict[str, Any]) -> ProcessorMixin | None:
    try:
        processor = AutoProcessor.from_pretrained(source, **common)
    except (OSError, ValueError, ImportError) as error:
        logger.warning("the processor of %s cannot be loaded and will not be saved: %s", source, named(error))
        return None
    return processor if isinstance(processor, ProcessorMixin) else None


def _prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin | None, settings: ModelSettings
) -> None:
    tokenizer.padding_side = "left"
    if not tokenizer.chat_template and processor is not None:
        tokenizer.chat_template = getattr(processor, "chat_template", None)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{settings.id} is not a chat model (its tokenizer has no chat template):"
            " use an instruction-tuned model, or add a chat_template.jinja to a local copy"
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked out, so which token it is does not matter; it only has to exist.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
