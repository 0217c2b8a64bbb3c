"""The table of architectures: where each model family keeps the modules that write to the residual stream.

``FAMILIES`` is data: one row per family, found by the text model's ``model_type``. A row names the modules around
the blocks and the *sites* inside a block, relative to it. Layers of one model may differ (hybrids with linear
attention, dense layers between mixtures of experts): each block has those of its family's sites that exist in it.
``REFUSED`` names kinds of models that cannot be edited, with the reason. What is in neither is probed
(``probing.py``); the sweep over all families of transformers holds the rows against what probing finds.

Every site hooks a module whose output is *exactly* the linear map of the named weights, before a gate, norm or
residual multiplier touches it:

- ``Linear`` / GPT-2's ``Conv1D`` (stored ``(in, out)``): the output is W x + b. The bias b is not edited.
- fused experts (3-D parameters): the module returns the router-weighted sum over experts, whatever transformers'
  experts implementation (eager, batched_mm, grouped_mm) computes it. All experts are one map [W_1 ... W_E] that acts
  on the concatenated weighted inputs, so `pre` and `full` edits use row norms of that concatenation. Expert biases
  (gpt_oss) are weighted by the router too, hence further *columns* of the map, and are edited with it.
- shared experts are writers of their own; the sigmoid gate that follows scales whole tokens and commutes with the edit.
- a norm or a scalar multiplier after the module (gemma, olmo2, granite) stays outside of the edit.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from bruno_ray.errors import ModelError


@dataclass(frozen=True)
class Site:
    """A place in a block that writes to the residual stream."""

    component: str
    """"attention" or "mlp"."""

    path: str
    """Module to hook, relative to the block."""

    experts: str = ""
    """For fused experts: the 3-D parameter (E, d_model, in) of that module."""

    transposed: bool = False
    """The fused parameter is (E, in, d_model)."""

    experts_bias: str = ""
    """For fused experts: the (E, d_model) bias parameter."""

    stacked: bool = False
    """Fused experts whose module returns each expert's output, (E * tokens, d_model), and leaves the sum to others."""


@dataclass(frozen=True)
class Family:
    """One row of the table. ``stacks`` are paths of the text model from the root, first match wins."""

    sites: tuple[Site, ...]
    stacks: tuple[str, ...] = (
        "model.language_model",
        "model.text_model",
        "language_model.model",
        "model",
    )
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    other_embeddings: tuple[str, ...] = ()
    every_layer_has_both: bool = True
    """A layer without attention, or without an MLP, is a row that does not fit."""


_ATTENTION = Site("attention", "self_attn.o_proj")
_LINEAR_ATTENTION = Site("attention", "linear_attn.out_proj")
_STATES = Site("attention", "mamba.out_proj")
_MLP = Site("mlp", "mlp.down_proj")
_EXPERTS = Site("mlp", "mlp.experts", experts="down_proj")
_SHARED_EXPERT = Site("mlp", "mlp.shared_expert.down_proj")
_SHARED_EXPERTS = Site("mlp", "mlp.shared_experts.down_proj")
_GRANITE_EXPERTS = Site("mlp", "block_sparse_moe.experts", experts="down_proj")
_GRANITE_SHARED = Site("mlp", "shared_mlp.output_linear")
_FEED_FORWARD = Site("mlp", "feed_forward.down_proj")

_DENSE = Family((_ATTENTION, _MLP))
_MOE = Family((_ATTENTION, _MLP, _EXPERTS, _SHARED_EXPERT))
_HYBRID = Family((_ATTENTION, _LINEAR_ATTENTION, _MLP, _EXPERTS, _SHARED_EXPERT))
_DEEPSEEK = Family((_ATTENTION, _MLP, _EXPERTS, _SHARED_EXPERTS))
_GRANITE_MOE = Family((_ATTENTION, _STATES, _GRANITE_EXPERTS, _GRANITE_SHARED))
_STATE_SPACE = Family((_ATTENTION, _STATES, _FEED_FORWARD), final_norm="final_layernorm")

_NAMES: dict[Family, str] = {
    _DENSE: """
        llama mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text gemma4_unified_text phi3
        olmo olmo2 olmo3 granite granite_swa smollm3 cohere cohere2 glm glm4 glm4v_text apertus arcee bitnet
        cwm diffllama doge ernie4_5 exaone4 helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2
        minicpm3 nemotron qwen2_vl_text qwen2_5_vl_text qwen3_vl_text seed_oss stablelm vaultgemma youtu
        qwen2_5_omni_text hunyuan_vl_text glm_ocr_text paddleocr_vl_text granite_docling_text
        phi4_multimodal
    """,
    _MOE: """
        mixtral olmoe qwen2_moe qwen3_moe flex_olmo mimo_v2_flash minimax_m2 phimoe qwen3_vl_moe_text zaya
        mellum qwen3_omni_moe_text flint
    """,
    _HYBRID: "qwen3_next qwen3_5_text qwen3_5_moe_text",
    _DEEPSEEK: """
        deepseek_v2 deepseek_v3 glm4_moe glm4_moe_lite glm4v_moe_text afmoe axk1 cohere2_moe dots1
        ernie4_5_moe exaone_moe hy_v3 laguna solar_open mistral4 minimax_m3_vl_text step3p5
        kolibri1
    """,
    _GRANITE_MOE: "granitemoe granitemoe_swa granitemoeshared granitemoehybrid",
    _STATE_SPACE: "bamba falcon_h1",
}

FAMILIES: dict[str, Family] = {name: family for family, names in _NAMES.items() for name in names.split()} | {
    "aria_text": Family(
        (_ATTENTION, Site("mlp", "mlp.experts", experts="down_proj", transposed=True), _SHARED_EXPERTS)
    ),
    # per_layer_projection (a gated third write of some sizes) is left alone; coverage() shows it
    "gemma4_text": Family((_ATTENTION, _MLP, Site("mlp", "experts", experts="down_proj"))),
    # four streams, of which the first is read; what a layer writes goes into all, times numbers per token.
    # per_layer_projection is left alone, as in gemma4
    "gemma3n_text": Family((_ATTENTION, _MLP, Site("mlp", "laurel.linear_right"))),
    "gpt2": Family(
        (Site("attention", "attn.c_proj"), Site("mlp", "mlp.c_proj")),
        stacks=("transformer",),
        blocks="h",
        embedding="wte",
        final_norm="ln_f",
        other_embeddings=("wpe",),
    ),
    "gpt_neox": Family(
        (Site("attention", "attention.dense"), Site("mlp", "mlp.dense_4h_to_h")),
        stacks=("gpt_neox",),
        embedding="embed_in",
        final_norm="final_layer_norm",
    ),
    "gpt_oss": Family(
        (
            _ATTENTION,
            Site("mlp", "mlp.experts", experts="down_proj", transposed=True, experts_bias="down_proj_bias"),
        )
    ),
    "hunyuan_v1_moe": Family((_ATTENTION, _EXPERTS, Site("mlp", "mlp.shared_mlp.down_proj"))),
    "jamba": Family(
        (_ATTENTION, _STATES, _FEED_FORWARD, Site("mlp", "feed_forward.experts", experts="down_proj")),
        final_norm="final_layernorm",
    ),
    "lfm2": Family(
        (Site("attention", "self_attn.out_proj"), Site("attention", "conv.out_proj"), Site("mlp", "feed_forward.w2")),
        final_norm="embedding_norm",
    ),
    "lfm2_moe": Family(
        (
            Site("attention", "self_attn.out_proj"),
            Site("attention", "conv.out_proj"),
            Site("mlp", "feed_forward.w2"),
            Site("mlp", "feed_forward.experts", experts="down_proj"),
        ),
        final_norm="embedding_norm",
    ),
    # the router scales what an expert reads, and the sum over experts is taken outside of the module
    "llama4_text": Family(
        (
            _ATTENTION,
            _FEED_FORWARD,
            Site("mlp", "feed_forward.shared_expert.down_proj"),
            Site("mlp", "feed_forward.experts", experts="down_proj", transposed=True, stacked=True),
        )
    ),
    "lfm3": Family(
        (_ATTENTION, Site("attention", "conv.out_proj"), Site("mlp", "feed_forward.w2")), final_norm="embedding_norm"
    ),
    # each layer is attention, a state space or an MLP
    "nemotron_h": Family(
        (
            Site("attention", "mixer.o_proj"),
            Site("attention", "mixer.out_proj"),
            Site("mlp", "mixer.down_proj"),
            Site("mlp", "mixer.experts", experts="down_proj"),
            Site("mlp", "mixer.shared_experts.down_proj"),
        ),
        embedding="embeddings",
        final_norm="norm_f",
        every_layer_has_both=False,
    ),
    "nanochat": Family((_ATTENTION, Site("mlp", "mlp.fc2"))),
    "olmo_hybrid": Family((_ATTENTION, Site("attention", "linear_attn.o_proj"), _MLP)),
    "phi": Family((Site("attention", "self_attn.dense"), Site("mlp", "mlp.fc2")), final_norm="final_layernorm"),
    "starcoder2": Family((_ATTENTION, Site("mlp", "mlp.c_proj"))),
}

_NO_CACHE = "it keeps no key-value cache (answers are written with one)"
_BOTH_WAYS = "its prompts attend both ways, so a padded row is not what it is alone"
_SEVERAL = "its layers carry several streams at once"
_PICKS = "its attention picks other tokens in a padded batch, so rows do not stay what they are alone"

_REFUSED: dict[str, str] = {
    _NO_CACHE: "mamba mamba2 falcon_mamba rwkv xlstm recurrent_gemma openai-gpt xlnet xlm reformer cpmant",
    _PICKS: "deepseek_v32 glm_moe_dsa axk2 hy_v4 mistral_large4_text",
    _BOTH_WAYS: "paligemma",
    _SEVERAL: "deepseek_v4",
    "it classifies images and writes no answers": "shieldgemma2",
}

REFUSED: dict[str, str] = {name: reason for reason, names in _REFUSED.items() for name in names.split()}
"""Model types, of the whole model or of its text model, that cannot be edited, and why."""


def require_known(config: PreTrainedConfig, name: str) -> None:
    """Look a model up before anything else of it is loaded.

    Raises ModelError with the reason if it cannot be edited. One that is in no table may still be probed.
    """
    text = config.get_text_config(decoder=True)
    reason = REFUSED.get(config.model_type) or REFUSED.get(text.model_type)
    if reason is None and getattr(text, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model, and only decoders can be edited"
    if reason is None and not getattr(text, "hidden_size", None):
        reason = "its config names no hidden_size of a text model"
    if reason:
        raise ModelError(f"{name} ({text.model_type}) cannot be edited: {reason}")


def in_table(config: PreTrainedConfig) -> bool:
    """Whether the table says where the model writes; otherwise it has to be probed."""
    return config.get_text_config(decoder=True).model_type in FAMILIES
