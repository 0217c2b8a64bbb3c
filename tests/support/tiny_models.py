"""Tiny random models of every supported family, and a tokenizer with a chat template. Nothing is downloaded.

    model = build("llama")                          # random weights, float32, eval mode, two to four layers, hidden 32
    tokenizer = build_tokenizer()                   # byte level: every text round-trips, one token per byte
    folder = write(tmp_path / "m", "qwen3")         # a folder that AutoModel/AutoTokenizer load

Weights are drawn at unit gain, not with a model's own tiny initialisation: otherwise the attention and MLP
outputs vanish beside the embedding and no edit of them would show in the logits.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

SPECIAL_TOKENS = ("<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>", "<boi>", "<eoi>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
HIDDEN = 32
LAYERS = 3

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_QWEN3_5_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN}
_GEMMA4 = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "sliding_window": 16,
    "num_kv_shared_layers": 0,
}
_GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 16}


def _text(model_type: str, without: tuple[str, ...] = (), **overrides: object) -> PretrainedConfig:
    values = {key: value for key, value in (_TEXT | overrides).items() if key not in without}
    return AutoConfig.for_model(model_type, **values)


def _gemma3_multimodal() -> PretrainedConfig:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    return AutoConfig.for_model(
        "gemma3",
        text_config=_TEXT | _GEMMA,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=262,
        boi_token_index=263,
        eoi_token_index=264,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        tie_word_embeddings=False,
    )


def _qwen3_5_multimodal(model_type: str, **text: object) -> PretrainedConfig:
    return AutoConfig.for_model(
        model_type,
        text_config=_TEXT | _LINEAR_ATTENTION | text,
        vision_config=_QWEN3_5_VISION,
        image_token_id=262,
        video_token_id=262,
        vision_start_token_id=263,
        vision_end_token_id=264,
    )


def _gpt2() -> PretrainedConfig:
    return AutoConfig.for_model(
        "gpt2",
        vocab_size=VOCAB_SIZE,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_positions=512,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    )


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _text("llama"),
    "mistral": lambda: _text("mistral"),
    "qwen2": lambda: _text("qwen2", without=("head_dim",)),
    "ministral3": lambda: _text("ministral3"),
    "qwen3": lambda: _text("qwen3"),
    "gemma": lambda: _text("gemma"),
    "gemma2": lambda: _text("gemma2", **_GEMMA),
    "gemma3_text": lambda: _text("gemma3_text", **_GEMMA),
    "gemma3": _gemma3_multimodal,
    # a dense MLP and a mixture of experts side by side, and a third write per layer
    "gemma4_text": lambda: _text(
        "gemma4_text",
        **_GEMMA4,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
    "phi3": lambda: _text("phi3", without=("head_dim",)),
    "olmo2": lambda: _text("olmo2", without=("head_dim",)),
    "olmo3": lambda: _text("olmo3", without=("head_dim",), sliding_window=16),
    "smollm3": lambda: _text("smollm3", without=("head_dim",)),
    "cohere2": lambda: _text("cohere2", without=("head_dim",), sliding_window=16),
    "glm4": lambda: _text("glm4"),
    "granite": lambda: _text("granite", without=("head_dim",), residual_multiplier=0.5),
    "gpt2": _gpt2,
    "gpt_neox": lambda: _text("gpt_neox", without=("head_dim", "num_key_value_heads")),
    "mixtral": lambda: _text("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: _text("olmoe", without=("head_dim",), num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: _text(
        "qwen2_moe", without=("head_dim",), **_MOE, num_experts=4, shared_expert_intermediate_size=24
    ),
    # the first layer is dense, the others are mixtures of experts
    "qwen3_moe": lambda: _text("qwen3_moe", **_MOE, num_experts=4, mlp_only_layers=[0]),
    "qwen3_next": lambda: _text(
        "qwen3_next", **_MOE, **_LINEAR_ATTENTION, num_experts=4, shared_expert_intermediate_size=24
    ),
    "qwen3_5_text": lambda: _text("qwen3_5_text", **_LINEAR_ATTENTION),
    "qwen3_5_moe_text": lambda: _text(
        "qwen3_5_moe_text", **_MOE, **_LINEAR_ATTENTION, num_experts=4, shared_expert_intermediate_size=24
    ),
    "qwen3_5_moe": lambda: _qwen3_5_multimodal(
        "qwen3_5_moe", **_MOE, num_experts=4, shared_expert_intermediate_size=24
    ),
    "gpt_oss": lambda: _text("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "granitemoe": lambda: _text(
        "granitemoe", without=("head_dim",), num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.5
    ),
    # the first layer is dense
    "glm4_moe": lambda: _text(
        "glm4_moe",
        **_MOE,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    # the same with multi-head latent attention
    "deepseek_v3": lambda: _text(
        "deepseek_v3",
        without=("head_dim",),
        **_MOE,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}
MULTIMODAL = ("gemma3", "qwen3_5_moe")
FOR_4BIT = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "moe_intermediate_size": 64}
"""Changes to a config after which bitsandbytes' 4-bit kernel for CPUs works: it needs inputs in multiples of 64."""


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew: matrices at unit gain, vectors (norms, biases) around what they were."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim >= 2:
                parameter.copy_(noise * min(parameter.shape[-1], HIDDEN) ** -0.5)
            else:
                parameter.add_(0.1 * noise)


def build(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """One random model in eval mode; `changes` are set on its (text) config first, such as ``hidden_size=64``."""
    config = FAMILIES[family]()
    text = config.get_text_config()
    for key, value in changes.items():
        if hasattr(text, key):  # names differ between families: not every one has a head_dim
            setattr(text, key, value)
    auto_class = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto_class.from_config(config, attn_implementation="eager")
    randomize(model, seed)
    return model.to(dtype).eval()


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer, ids 0-255 bytes, then SPECIAL_TOKENS; `<|end|>` ends a turn and is the EOS token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", model_max_length=512
    )
    wrapped.chat_template = chat_template
    return wrapped


def write(
    folder: Path, family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """Save a tiny model and its tokenizer the way a hub repository holds them."""
    build(family, seed, dtype, **changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def write_with_mtp(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """As `write`, with a layer for multi-token prediction that no model class loads, named as on the hub.

    Only for families whose published checkpoints have one: glm4_moe and deepseek_v3 keep it as a block beyond the last,
    the qwen3 ones under `mtp`. It has the shapes of the model's last block.
    """
    write(folder, family, dtype=dtype, **changes)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    n_layers = config["num_hidden_layers"]
    last = f"model.layers.{n_layers - 1}."
    beyond = family in ("glm4_moe", "deepseek_v3")
    block = f"model.layers.{n_layers}." if beyond else "mtp.layers.0."
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * HIDDEN**-0.5).to(dtype)

    mtp = {
        name.replace(last, block): draw(*tensor.shape) if tensor.ndim > 1 else tensor.clone()
        for name, tensor in weights.items()
        if name.startswith(last)
    }
    hidden = config["hidden_size"]
    if beyond:
        mtp |= {
            f"{block}{name}.weight": torch.ones(hidden, dtype=dtype) for name in ("enorm", "hnorm", "shared_head.norm")
        }
        mtp |= {f"{block}eh_proj.weight": draw(hidden, 2 * hidden)}
        mtp |= {f"{block}embed_tokens.weight": weights["model.embed_tokens.weight"].clone()}
        mtp |= {f"{block}shared_head.head.weight": weights["lm_head.weight"].clone()}
    else:
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        mtp |= {f"mtp.{name}.weight": torch.ones(hidden, dtype=dtype) for name in norms}
        mtp |= {"mtp.fc.weight": draw(hidden, 2 * hidden)}
    save_file(weights | mtp, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_nextn_predict_layers": 1} if beyond else {"mtp_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
