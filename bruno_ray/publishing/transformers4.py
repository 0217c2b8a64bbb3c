"""Make what transformers 5 writes readable by transformers 4.57, without changing what 5 reads.

Version 5 renamed things that version 4 then misses, some of them silently:

    config.json            `rope_parameters` replaced `rope_theta` and `rope_scaling`: 4.57 ignores the new key and
                           falls back to its own default frequencies, so the model loads and computes nonsense;
                           `num_local_experts` is written where 4.57's Qwen3-MoE reads `num_experts`
    tokenizer_config.json  `extra_special_tokens` became a list (4.57 fails on it with a message about protobuf),
                           `tokenizer_class` may be TokenizersBackend (4.57 knows no such class), `add_bos_token` is
                           no longer written (4.57's Llama and Gemma tokenizers then always add it)
    processor files        image and video processors moved into processor_config.json

Plain dictionaries in, plain dictionaries out. `saving.py` writes them and checks that version 5 still reads the same.
"""

from typing import Any

# Keys of the checkpoint that say how it was stored, not what it is.
NOT_CARRIED_OVER = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config"}

NEOX_TYPES = {"gpt_neox", "gpt_neox_japanese"}
PHI3_TYPES = {"phi3", "phimoe", "phi4_multimodal"}


def readable_config(written: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """The config as version 5 wrote it, with the older names beside the newer ones.

    Args:
        written: config.json of the saved model.
        source: config.json of the base model; older names that it has are taken from there as they are.

    Returns:
        A new dictionary; sub-configs (text_config, vision_config) are treated alike.
    """
    older = older_rope_names(written)
    if "num_local_experts" in written:
        older["num_experts"] = written["num_local_experts"]
    merged = {**older, **written}
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(written.get(key), dict) and key.endswith("_config"):
            merged[key] = readable_config(written[key], value)
        elif key not in written and key not in NOT_CARRIED_OVER:
            merged[key] = value
    for key, value in written.items():
        if isinstance(value, dict) and key.endswith("_config") and key not in source:
            merged[key] = readable_config(value, {})
    return merged


def older_rope_names(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and relatives, from `rope_parameters`; empty where there are none."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    model_type = config.get("model_type", "")
    if {"full_attention", "sliding_attention"} <= rope.keys():  # one set per kind of attention, as in Gemma 3
        names = _one_rope(rope["full_attention"] or {}, model_type)
        return names | {"rope_local_base_freq": (rope["sliding_attention"] or {}).get("rope_theta")}
    if any(isinstance(value, dict) for value in rope.values()):  # kinds that version 4 has no words for
        return {}
    return _one_rope(rope, model_type)


def _one_rope(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    names = {"rope_theta": rope.get("rope_theta")}
    if "partial_rotary_factor" in rope:
        names["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if model_type in NEOX_TYPES:
        names |= {"rotary_emb_base": rope.get("rope_theta"), "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") == "default" and len(scaling) <= 1:
        scaling = None
    elif model_type in PHI3_TYPES:  # insists on exactly these three fields
        kept = {k: scaling[k] for k in ("short_factor", "long_factor") if k in scaling}
        scaling = {"type": scaling["rope_type"], **kept}
    return names | {"rope_scaling": scaling}


def readable_tokenizer_config(written: dict[str, Any], add_bos_token: bool | None = None) -> dict[str, Any]:
    """tokenizer_config.json in words that both versions know.

    Args:
        written: as saved by version 5, or taken from the base model, whatever version wrote that.
        add_bos_token: whether the tokenizer starts every text with its BOS token; None leaves it open.
    """
    config = {key: value for key, value in written.items() if key != "backend"}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        if extra:
            config.setdefault("additional_special_tokens", extra)
    if add_bos_token is not None:
        config.setdefault("add_bos_token", add_bos_token)
    return config


def readable_processor_files(processor_config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """processor_config.json split into the files that both versions read: file name -> content.

    Version 5 nests the image and video processors in it; version 4 takes the nested dictionaries for the processors
    themselves and fails, but finds them in files of their own, as version 5 still does.
    """
    places = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
    nested = {key: places[key] for key in places if isinstance(processor_config.get(key), dict)}
    files = {"processor_config.json": {k: v for k, v in processor_config.items() if k not in nested}}
    return files | {name: processor_config[key] for key, name in nested.items()}
