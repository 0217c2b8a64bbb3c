"""Tiny random models of every decoder family that transformers knows, with or without a row in our table.

    config = tiny_config("glm4v")            # sizes of a few dozen, everything else as the family has it by default
    model = tiny_model("glm4v")              # or raises: some families need packages or sizes that are not tiny

Sizes are set by the names that families have for them, in the whole config and in each part of it.
"""

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from bruno_ray.model.classes import auto_class
from tests.support import tiny_models

BIGGEST = 20_000_000
"""Parameters of a model that still counts as tiny."""

_LAYERS = 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dff", "inner_dim"), 48),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_layers", "layers"), _LAYERS
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), tiny_models.VOCAB_SIZE),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "num_shared_experts", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 2,
    "hidden_size_per_layer_input": 8,
    "index_topk": 4,  # sparse attention picks among the tokens of even a short prompt
    "query_pre_attn_scalar": 8,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_n_groups_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "block_ff_dim": 48,
    "block_dim": 32,
    "conv_dim": 32,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "tie_word_embeddings": False,
}
_VISION = {
    **dict.fromkeys(("hidden_size", "embed_dim", "width", "d_model", "projection_dim"), 16),
    **dict.fromkeys(("intermediate_size", "mlp_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "layers", "num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "output_dim"), 32),
    "image_size": 16,
    "patch_size": 4,
}
_TOKENS = {
    **dict.fromkeys(
        ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id"), 262
    ),
    **dict.fromkeys(("boi_token_index", "vision_start_token_id", "image_start_token_id", "boi_token_id"), 263),
    **dict.fromkeys(("eoi_token_index", "vision_end_token_id", "image_end_token_id", "eoi_token_id"), 264),
}
_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"), _SECTIONS),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "paddleocr_vl_text"), _SECTIONS),
    **dict.fromkeys(("qwen2_5_omni_text", "qwen3_omni_moe_text", "ernie4_5_vl_moe_text"), _SECTIONS),
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "nemotron_h": {"hybrid_override_pattern": "M*-M"},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "minimax_m2": {"rotary_dim": 8},
    "mistral4": {"num_key_value_heads": 4},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "hunyuan_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
    },
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"] * 2},
}


def families() -> set[str]:
    """Model types with a class that writes text."""
    mappings = (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return {config.model_type for mapping in mappings for config in mapping}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Raises whatever the family's config raises on sizes that do not fit it."""
    return AutoConfig.for_model(model_type, **_sizes(model_type, SIZES))


def _sizes(model_type: str, table: dict[str, Any]) -> dict[str, Any]:
    kind = CONFIG_MAPPING[model_type]
    try:
        default: Any = kind()
    except Exception:
        default = None
    names = set(vars(default)) | set(kind.attribute_map) if default is not None else set(table)
    if any(getattr(default, part, None) is not None for part in getattr(kind, "sub_configs", {}) or {}):
        names -= {"vocab_size"} if "vocab_size" not in vars(default) else set()
    sizes = {name: value for name, value in table.items() if name in names}
    sizes |= {name: value for name, value in _TOKENS.items() if name in names}
    for name in list(sizes):
        other = kind.attribute_map.get(name)
        if other is not None and other in sizes:  # two names of one thing
            del sizes[name]
    for part in getattr(kind, "sub_configs", {}) or {}:
        inner = getattr(default, part, None)
        if inner is None:
            continue
        vision = any(word in part for word in ("vision", "audio", "encoder", "image", "vit", "sam"))
        inner_type = inner.model_type
        if inner_type in CONFIG_MAPPING:
            sizes[part] = {"model_type": inner_type} | _sizes(inner_type, _VISION if vision else SIZES)
        else:
            table_ = _VISION if vision else SIZES
            sizes[part] = {name: value for name, value in table_.items() if name in vars(inner)}
    if "kv_lora_rank" in names:  # latent attention: sizes of heads have names of their own
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
    return sizes | SPECIAL.get(model_type, {})


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """In eval mode, float32. Raises what building it raises, ValueError if it is not tiny."""
    config = tiny_config(model_type)
    kind = auto_class(config)._model_mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    if not hasattr(config, "pad_token_id"):
        config.pad_token_id = 256
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > BIGGEST:
        raise ValueError(f"too big to be tiny: {size:,} parameters")
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation="eager")
    tiny_models.randomize(model, seed)
    return model.float().eval()
