"""Tiny GGUF files, written with the gguf package by llama.cpp's conventions from the tiny models.

model = write_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0")     # the transformers model that was written
"""

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from gguf.constants import MODEL_ARCH_NAMES
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from tests.support import tiny_models

MERGE = ("h", "e")
N_TOKENS = tiny_models.VOCAB_SIZE + 1
"""The byte-level vocabulary of the tiny models, and "he": a GGUF tokenizer needs a merge."""

BLOCK = 32
"""Values that share a scale in Q8_0, Q4_0 and Q4_1; rows are multiples of it."""

SIZES = {"vocab_size": N_TOKENS, "intermediate_size": 64}
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
CONTROL = 3


def write_gguf(
    file: Path, family: str = "llama", kind: str = "F32", metadata: dict[str, object] | None = None, **changes: object
) -> PreTrainedModel:
    """Write a random model of the family with its matrices in ``kind``; returns it.

    Args:
        family: a key of ARCHITECTURES.
        kind: F32, F16, BF16, Q8_0, Q4_0 or Q4_1. Vectors are always F32, as llama.cpp has it.
        metadata: more keys, or other values of keys: str, int, float, bool, or None for no such key.
        changes: of the config.
    """
    model = tiny_models.build(family, **(SIZES | changes))
    write_model(file, model, kind, metadata)
    return model


def write_model(
    file: Path, model: PreTrainedModel, kind: str = "F32", metadata: dict[str, object] | None = None
) -> None:
    """The same for a model that is there, of one of the families and with SIZES."""
    architecture = ARCHITECTURES[model.config.model_type]
    writer = GGUFWriter(file, architecture)
    _write_config(writer, model, architecture)
    _write_tokenizer(writer)
    for key, value in (metadata or {}).items():
        if value is None:
            del writer.kv_data[0][key]
            continue
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    names = get_tensor_name_map(
        next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), model.config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        values = as_llama_cpp(name, tensor, model).numpy()
        _write_tensor(writer, f"{names.get_name(stem)}.{suffix}", values, kind)
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "llama3":
        _write_tensor(writer, "rope_freqs.weight", llama3_divisors(model).numpy(), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_llama_cpp(name: str, tensor: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """What llama.cpp's converter makes of a parameter: pairs of rotary dimensions side by side, norms plus one."""
    config = model.config
    if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def llama3_divisors(model: PreTrainedModel) -> torch.Tensor:
    """How much slower than plain ones Llama 3's rotary frequencies are, each."""
    rope = model.config.rope_parameters
    exponents = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
    return 1.0 / (rope["rope_theta"] ** exponents * model.model.rotary_emb.inv_freq)


def _write_tensor(writer: GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim < 2 or kind == "F32":
        writer.add_tensor(name, values)
        return
    quantisation = GGMLQuantizationType[kind]
    writer.add_tensor(name, quantize(values, quantisation), raw_dtype=quantisation)


def _write_config(writer: GGUFWriter, model: PreTrainedModel, architecture: str) -> None:
    config = model.config
    rope = config.rope_parameters
    writer.add_name("Tiny")
    writer.add_license("cc0-1.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)


def _write_tokenizer(writer: GGUFWriter) -> None:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*symbols, *tiny_models.SPECIAL_TOKENS, "".join(MERGE)])
    writer.add_token_types([1] * len(symbols) + [CONTROL] * len(tiny_models.SPECIAL_TOKENS) + [1])
    writer.add_token_merges([" ".join(MERGE)])
    for add, token in (
        (writer.add_pad_token_id, "<pad>"),
        (writer.add_bos_token_id, "<s>"),
        (writer.add_eos_token_id, "<|end|>"),
    ):
        add(len(symbols) + tiny_models.SPECIAL_TOKENS.index(token))
    writer.add_add_bos_token(False)
    writer.add_chat_template(tiny_models.CHAT_TEMPLATE)
