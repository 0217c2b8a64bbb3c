"""GGUF files as base models: dequantised once into a folder of safetensors in the cache, which loads like any other.

transformers does the reading. What it would get wrong without a word is put right here, or refused: numbers and spaces
split as another tokenizer splits them, frequencies that llama.cpp keeps in a tensor, weights that the model class has
no place for. Imports torch and transformers only where a file is converted.
"""

import hashlib
import importlib.util
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from bruno_ray.errors import ModelError
from bruno_ray.files import atomic_directory, cache_folder, file_chunks, output_errors, require_free_space

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT = 1
"""Counts what this module makes of a file; part of the name in the cache."""

SPLIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""Values of tokenizer.ggml.pre for GPT-2's splitting with every digit apart (llama.cpp, llama-vocab.cpp)."""

SPLIT_AS_GPT2 = {"gpt-2", "default", "phi-2", "mpt", "olmo", "jais"}
"""Values for which transformers' own choice, GPT-2's splitting, is right."""


def require_gguf() -> None:
    """Raises ModelError unless the `gguf` package is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading GGUF files needs the gguf package: install it with `pip install bruno-ray[gguf]`")


def gguf_folder(file: Path, dtype: str = "auto") -> Path:
    """The model of a GGUF file as a folder in the cache, made at the first call. Safe to call from several processes.

    Args:
        file: the .gguf file. A ``chat_template.jinja`` beside it counts if the file has no chat template.
        dtype: what the weights are kept in; "auto" is that of a file without quantised tensors, else float32, which
            holds what is dequantised exactly.

    Raises:
        ModelError: the file is damaged or no GGUF file, transformers cannot read its architecture, or the gguf package
            is missing.
        OutputError: the cache cannot be written.
    """
    if not file.is_file():
        raise ModelError(f"there is no file {file}: check model.id and model.gguf_file")
    require_gguf()
    digest = hashlib.sha256(f"{FORMAT} {dtype} {file.stat().st_size}".encode())
    for chunk in file_chunks(file):
        digest.update(chunk)
    template = file.with_name("chat_template.jinja")
    if template.is_file():
        digest.update(template.read_bytes())
    folder = cache_folder("models") / f"{file.stem}-{digest.hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    with output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # whoever waited here finds the folder
        if not (folder / "config.json").is_file():
            convert(file, folder, dtype)
    return folder


def convert(file: Path, folder: Path, dtype: str = "auto", card: str = "") -> None:
    """Write the model of a GGUF file to a new ``folder``, dequantised. Arguments and errors as for ``gguf_folder``."""
    reader = _open(file)
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    stored = _dtype(reader, dtype)
    n_values = sum(int(tensor.n_elements) for tensor in reader.tensors)
    require_free_space(folder.parent, n_values * getattr(torch, stored).itemsize, f"what {file.name} holds")
    logger.info("dequantising %s: %.3g parameters to %s", file.name, n_values, stored)
    with TemporaryDirectory() as alone:  # other files beside it, such as a tokenizer.json, would have a say
        link = Path(alone) / "model.gguf"
        link.symlink_to(file.absolute())
        source: dict[str, Any] = {"pretrained_model_name_or_path": alone, "gguf_file": link.name}
        unpacked: dict[str, Any] = {}
        if hasattr(transformers, "GgufConfig"):  # before there was one, everything was dequantised
            unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
        try:
            config = AutoConfig.from_pretrained(**source)
            _round(config)
            _restore_attention(config, reader)
            _restore_rope(config, reader)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model, found = AutoModelForCausalLM.from_pretrained(
                **source, **unpacked, config=config, dtype=getattr(torch, stored), output_loading_info=True
            )
        except (ValueError, KeyError, NotImplementedError, RuntimeError, TypeError, IndexError) as error:
            raise _unreadable(reader, file, str(error)) from error
    _require_whole(model, found["missing_keys"], reader, file)
    _restore_splitting(tokenizer, reader, file)
    _restore_template(tokenizer, file)
    # What the file was stored in is no property of what is written now.
    model.hf_quantizer = None
    model.is_quantized = False
    for attribute in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    for option in ("is_local", "local_files_only", "vocab_file"):
        tokenizer.init_kwargs.pop(option, None)
    with atomic_directory(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(card or _card(reader, file), encoding="utf-8")


# ----- the file itself -----


def _open(file: Path) -> "GGUFReader":
    """A reader of a file that is whole. Raises ModelError."""
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{file} is not a GGUF file: give one, or the folder of a model in model.id")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{file} is damaged or not whole ({type(error).__name__}): copy or download it again"
        ) from error
    missing = max((t.data_offset + int(t.n_bytes) for t in reader.tensors), default=0) - file.stat().st_size
    if missing > 0 or not reader.tensors:
        raise ModelError(f"{file} is not whole ({max(missing, 0):,} bytes are missing): copy or download it again")
    if (_value(reader, "split.count") or 1) > 1:
        raise ModelError(
            f"{file} is one of {_value(reader, 'split.count')} parts: join them with `llama-gguf-split --merge`"
        )
    return reader


def _value(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _dtype(reader: "GGUFReader", wish: str) -> str:
    if wish != "auto":
        return wish
    # Norms are F32 in every file: the half type is that of the matrices.
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    if kinds <= {"F32", "F16"} and "F16" in kinds:
        return "float16"
    if kinds <= {"F32", "BF16"} and "BF16" in kinds:
        return "bfloat16"
    return "float32"


def _unreadable(reader: "GGUFReader", file: Path, reason: str) -> ModelError:
    architecture = _value(reader, "general.architecture")
    reason = next((line.strip() for line in reason.splitlines() if line.strip()), "no reason given")
    return ModelError(
        f"{file.name}: transformers cannot read GGUF files of the architecture {architecture}"
        f" ({reason[:200].rstrip('.')}): use the model's safetensors"
    )


def _require_whole(model: "PreTrainedModel", missing: Any, reader: "GGUFReader", file: Path) -> None:
    """Raise ModelError unless every weight of the model came from the file, and every tensor of the file has gone
    into the model. transformers draws the first at random and drops the second, both without a word."""
    if missing:
        raise _unreadable(reader, file, f"it does not find {len(missing)} of the weights, such as {min(missing)}")
    n_file = sum(int(t.n_elements) for t in reader.tensors if t.name not in ROPE_TENSORS)
    n_model = sum(parameter.numel() for parameter in model.parameters())
    if n_file != n_model:
        raise _unreadable(reader, file, f"it reads {n_model:,} of {n_file:,} parameters")


# ----- what transformers leaves out -----

ROPE_TENSORS = ("rope_freqs.weight",)
GEMMA_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Number of blocks by which llama.cpp knows the models that scale by the width of a head's share of the stream."""


def _round(config: "PreTrainedConfig") -> None:
    """Undo the cast to float32 of what was written with a few digits: 9.999999747378752e-06 is 1e-05."""
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"):
        if isinstance(value := getattr(config, name, None), float):
            setattr(config, name, float(f"{value:.6g}"))


def _restore_attention(config: "PreTrainedConfig", reader: "GGUFReader") -> None:
    """The size of heads, and what their scores are scaled by, where transformers keeps the defaults of its classes."""
    architecture = _value(reader, "general.architecture")
    length = _value(reader, f"{architecture}.attention.key_length")
    if architecture in ("llama", "qwen3") and length:
        config.head_dim = length
    if architecture in GEMMA_OF_27B and length:  # no key of the file says it: the numbers are llama.cpp's
        is_27b = config.num_hidden_layers == GEMMA_OF_27B[architecture]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else length


def _restore_rope(config: "PreTrainedConfig", reader: "GGUFReader") -> None:
    """Put the scaling of rotary frequencies back into the config, or raise ValueError where it cannot be expressed.

    llama.cpp keeps Llama 3's as divisors of the frequencies in a tensor, other kinds in the metadata.
    """
    architecture = _value(reader, "general.architecture")
    if (kind := _value(reader, f"{architecture}.rope.scaling.type")) not in (None, "none"):
        factor = _value(reader, f"{architecture}.rope.scaling.factor")
        if kind != "linear" or architecture not in ("llama", "qwen2", "qwen3"):
            raise ValueError(f"it has rotary frequencies of the kind {kind}")
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": float(factor)}
    tensor = next((tensor for tensor in reader.tensors if tensor.name in ROPE_TENSORS), None)
    if tensor is None:
        return
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divisors = torch.tensor(tensor.data.astype("float32"))
    plain = config.rope_parameters
    exponents = torch.arange(0, 2 * len(divisors), 2) / (2 * len(divisors))
    expected = 1.0 / (plain["rope_theta"] ** exponents * divisors)
    # Meta's own choices; the only thing that differs from model to model is the factor.
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": plain["rope_theta"],
        "factor": round(float(divisors.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if frequencies.shape != expected.shape or not torch.allclose(frequencies, expected, rtol=1e-3, atol=0):
        raise ValueError("it has rotary frequencies of its own")


def _restore_splitting(tokenizer: "PreTrainedTokenizerBase", reader: "GGUFReader", file: Path) -> None:
    """Split text before the merges as the vocabulary was made for, where transformers does not know how."""
    from tokenizers import pre_tokenizers

    kind = _value(reader, "tokenizer.ggml.pre")
    if _value(reader, "tokenizer.ggml.model") != "gpt2" or kind is None:
        return
    if kind in SPLIT_BY_DIGIT:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind not in SPLIT_AS_GPT2 and kind not in _known_to_transformers():
        logger.warning(
            "%s: transformers does not know how %r splits text and does it as GPT-2: numbers and spaces may become"
            " other tokens than the model was trained with",
            *(file.name, kind),
        )


def _known_to_transformers() -> set[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # older than 5.20
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _restore_template(tokenizer: "PreTrainedTokenizerBase", file: Path) -> None:
    beside = file.with_name("chat_template.jinja")
    if not tokenizer.chat_template and beside.is_file():
        tokenizer.chat_template = beside.read_text(encoding="utf-8")


def _card(reader: "GGUFReader", file: Path) -> str:
    """What the file says about itself, as a model card."""
    import yaml

    entries = {"library_name": "transformers", "license": _value(reader, "general.license")}
    entries["license_link"] = _value(reader, "general.license.link")
    front = yaml.safe_dump({key: value for key, value in entries.items() if value}, sort_keys=False)
    name = _value(reader, "general.name") or file.stem
    makers = [_value(reader, f"general.{key}") for key in ("organization", "author")]
    by = " by " + ", ".join(filter(None, makers)) if any(makers) else ""
    return f"---\n{front}---\n\n# {name}\n\nThe weights of the GGUF file `{file.name}`{by}, dequantised.\n"
