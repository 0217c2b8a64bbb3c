"""Load a chat model: dtype fallback, quantisation, devices, and one clear line for everything that can go wrong.

    loaded = load_model(ModelSettings(id="Qwen/Qwen3-0.6B"))
    loaded.model, loaded.tokenizer, loaded.architecture

The tokenizer pads on the left, always: every reader of the last position relies on it. The model is in eval mode
without gradients, its generation config neutral (greedy, no penalties); what the model came with is kept in
``generation_config`` for saving.
"""

import hashlib
import logging
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from bruno_ray.errors import ModelError
from bruno_ray.files import file_chunks
from bruno_ray.model.architectures import Architecture, find_architecture
from bruno_ray.model.batching import is_out_of_memory
from bruno_ray.model.loading_errors import explained, named
from bruno_ray.model.locating import locate
from bruno_ray.settings import ModelSettings

logger = logging.getLogger(__name__)

SLOWER = 1.2
"""Times float32 from which another dtype is not computed in on a CPU."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
IDENTITY_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model")
FULL_HASH_BYTES = 256 * 1024**2


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
    """Changes with weights, tokenizer, chat template, dtype and quantisation."""

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


def load_model(settings: ModelSettings, *, full_precision: bool = False) -> LoadedModel:
    """Load what the settings say. Raises ModelError with one line that says what to do.

    ``full_precision`` is for baking and saving: unquantised, in the dtype it is stored in, on the CPU.
    """
    source = locate(settings).id
    common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **common)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **common)
        multimodal = is_multimodal(config)
        processor = _load_processor(source, common) if multimodal else None
    except Exception as error:
        raise explained(error, settings) from error
    _prepare_tokenizer(tokenizer, processor, settings)
    if full_precision:
        settings = settings.model_copy(update={"dtypes": ("auto",), "quantization": "none", "device_map": "cpu"})
    model, dtype = _load_weights(source, settings, config, tokenizer, multimodal, trial=not full_precision)
    architecture = find_architecture(model)
    if (head := cast(PreTrainedModel, model).get_output_embeddings()) is not None:
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
        fingerprint=f"{fingerprint(source, config, tokenizer)}:{settings.quantization}:{dtype}",
        device=_input_device(architecture),
        generation_config=generation_config,
        lean_forward=settings.lean_forward != "off",
    )


def _contiguous(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What comes to the output embeddings in one piece. torch multiplies a part of a tensor, such as the last tokens of
    every row, with a copy of the whole vocabulary's weights per row."""
    return (arguments[0].contiguous(), *arguments[1:])


# ----- weights -----


def _load_weights(
    source: str,
    settings: ModelSettings,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    multimodal: bool,
    trial: bool,
) -> tuple[nn.Module, str]:
    """Try the dtypes in order; one is good when a one-token answer has finite logits."""
    auto_class = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    failures: dict[str, str] = {}
    too_big = 1 << 30  # itemsize of the smallest dtype that ran out of memory
    for wish in settings.dtypes:
        dtype = _resolve_dtype(wish, config, settings if trial else None)
        name = str(dtype).removeprefix("torch.")
        if name in failures:
            continue
        if dtype.itemsize >= too_big:
            failures[name] = "out of memory before, and this one is no smaller"
            continue
        model = None
        try:
            model = auto_class.from_pretrained(
                source,
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
                dtype=dtype,
                device_map=settings.device_map,
                max_memory=_max_memory(settings),
                quantization_config=_quantization(settings, dtype),
            )
            model.eval().requires_grad_(False)
            _tame_bitsandbytes(model, settings)
            if trial:
                _try_one_token(model, tokenizer)
            return model, name
        except ModelError:
            raise
        except Exception as error:
            # Dtypes fail in many ways (kernels that lack one, overflow, memory); what no dtype mends is raised at once.
            if is_out_of_memory(error):
                too_big = dtype.itemsize
                failures[name] = "out of memory"
            elif isinstance(error, (RuntimeError, FloatingPointError, NotImplementedError)):
                failures[name] = named(error)
            else:
                raise explained(error, settings) from error
            logger.warning("%s cannot run in %s: %s", settings.id, name, failures[name])
        finally:
            model = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    tried = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
    if all("out of memory" in reason for reason in failures.values()):
        raise ModelError(
            f"not enough memory for {settings.id} ({tried}): use model.quantization bnb_4bit, a smaller model,"
            " or raise model.max_memory"
        )
    raise ModelError(f"{settings.id} runs in none of model.dtypes ({tried}): add another dtype or use another model")


@torch.no_grad()
def _try_one_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Answer a greeting with one token and look at the logits before and after it. Raises FloatingPointError."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    first = model(input_ids=ids, use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    second = model(input_ids=token.to(ids.device), past_key_values=first.past_key_values, use_cache=True)
    if not (first.logits[:, -1].isfinite().all() and second.logits.isfinite().all()):
        raise FloatingPointError("logits are not finite")


def _resolve_dtype(wish: str, config: PreTrainedConfig, settings: ModelSettings | None = None) -> torch.dtype:
    """``auto`` is the dtype that is stored. With ``settings``, for computing: on a CPU that has no instructions for
    bfloat16 it is float32, which is the same numbers, many times faster."""
    if wish != "auto":
        return getattr(torch, wish)
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    stored = stored if stored in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16
    on_cpu = settings is not None and (settings.device_map == "cpu" or not torch.cuda.is_available())
    return torch.float32 if on_cpu and stored != torch.float32 and _is_slow(stored) else stored


@cache
def _is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices more slowly in ``dtype`` than in float32: measured, in milliseconds."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    slow = seconds(dtype) > SLOWER * seconds(torch.float32)
    if slow:
        logger.info("this CPU is slow in %s: computing in float32", str(dtype).removeprefix("torch."))
    return slow


def _quantization(settings: ModelSettings, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if settings.quantization == "bnb_4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if settings.quantization == "bnb_8bit" else None


def _tame_bitsandbytes(model: nn.Module, settings: ModelSettings) -> None:
    """Work around bitsandbytes 0.50 on CPUs, and keep the log readable.

    - With AVX512-BF16 the first forward pass repacks 4-bit weights into a layout that cannot be dequantised any more.
    - The 4-bit kernel takes each row for whole blocks; if it is not, all but the first row come out wrong
      (seen: 25% error on 864 inputs instead of 9%). Better refused than measured.
    """
    if settings.quantization == "bnb_4bit":
        for name, module in model.named_modules():
            if not hasattr(module, "support_avx512bf16_for_cpu"):
                continue
            module.support_avx512bf16_for_cpu = False
            block = module.weight.quant_state.blocksize
            if module.weight.device.type == "cpu" and module.in_features % block:
                raise ModelError(
                    f"bitsandbytes cannot run {name} in 4 bit on a CPU ({module.in_features} inputs are no multiple of"
                    f" {block}): use model.quantization bnb_8bit or none, or a GPU"
                )
    if settings.quantization == "bnb_8bit":  # one warning per matrix product that float32 inputs are cast
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _max_memory(settings: ModelSettings) -> dict[int | str, str] | None:
    """Accelerate wants GPU numbers as integers; configuration files can only say strings."""
    if settings.max_memory is None:
        return None
    return {int(key) if key.isdigit() else key: value for key, value in settings.max_memory.items()}


# ----- tokenizer and processor -----


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether the model comes in an image-text class, with a language model inside."""
    if getattr(config, "vision_config", None) is None:
        return False
    remote = getattr(config, "auto_map", None) or {}
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote


def hub_task(config: PreTrainedConfig) -> str:
    """The hub's `pipeline_tag` for a model that is loaded from this config."""
    if not is_multimodal(config):
        return "text-generation"
    return "any-to-any" if getattr(config, "audio_config", None) is not None else "image-text-to-text"


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


# ----- identity -----


def fingerprint(source: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """``id@commit`` for the hub; for a folder ``sha256:`` over its config, tokenizer and weights.

    Folders up to FULL_HASH_BYTES of weights are hashed in full. Of bigger files the name, the size, and the first,
    the last and 14 evenly spaced megabytes count: enough to tell any two trained models apart. The chat template
    as loaded is part of it, since it changes every prompt.
    """
    folder = Path(source)
    digest = hashlib.sha256(str(tokenizer.chat_template).encode())
    if not folder.is_dir():
        commit = getattr(config, "_commit_hash", None) or "unknown"
        return f"{source}@{commit}:{digest.hexdigest()[:8]}"
    weights = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
    whole = sum(path.stat().st_size for path in weights) <= FULL_HASH_BYTES
    for path in [folder / name for name in IDENTITY_FILES if (folder / name).exists()] + weights:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        for chunk in file_chunks(path, whole or path not in weights):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _input_device(architecture: Architecture) -> torch.device:
    device = architecture.embedding.weight.device
    if device.type == "meta":  # offloaded: accelerate moves inputs from the CPU
        return torch.device("cpu")
    return device
