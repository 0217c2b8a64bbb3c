"""Where a block reads the residual stream, family by family.

Only families that are named in ``READING`` have readers: a test watches a tiny model of each compute, and holds what
was read there against what is said here. Names in a block are few, so they are looked for in turn.
"""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bruno_ray.model.families import Family
from bruno_ray.model.modules import get
from bruno_ray.model.readers import Reader
from bruno_ray.model.writers import Matrix

_FAMILIES = """
    arcee axk1 bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 diffllama doge dots1 ernie4_5
    ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma4_unified_text glm glm4 glm4_moe
    glm4_moe_lite glm4v_moe_text glm4v_text glm_ocr_text gpt2 gpt_neox gpt_oss granite granite_docling_text
    granite_swa granitemoe helium hunyuan_v1_dense hunyuan_vl_text hy_v3 hyperclovax internlm3 iquestcoder jais2
    kolibri1 llama mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mistral4 mixtral nemotron
    olmo olmo2 olmo3 olmoe paddleocr_vl_text phi3 phi4_multimodal phimoe qwen2 qwen2_5_omni_text qwen2_5_vl_text
    qwen2_moe qwen2_vl_text qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_omni_moe_text
    qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
"""
READING = frozenset(_FAMILIES.split())
"""Text models' ``model_type``."""

_ATTENTION = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa")),
    *(f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b")),
    "linear_attn.in_proj_a",
    "attn.c_attn",
    "attention.query_key_value",
)
_MLP = (
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h")),
    *(f"mlp.{shared}.{name}" for shared in ("shared_expert", "shared_experts") for name in ("gate_proj", "up_proj")),
)
_EXPERTS = "gate_up_proj"


def find_readers(family: str, row: Family, layer: int, block: nn.Module, prefix: str, d_model: int) -> list[Reader]:
    """The readers of one block, whose module is called ``prefix``; none where the family is not in the table."""
    if family not in READING:
        return []
    attention_norm, mlp_norm = _norms(block)
    found = [
        _linear(block, path, f"{prefix}.{path}", layer, component, d_model, norm)
        for component, paths, norm in (
            ("attention_input", _ATTENTION, attention_norm),
            ("mlp_input", _MLP, mlp_norm),
        )
        for path in paths
    ]
    readers = [reader for reader in found if reader is not None]
    for site in row.sites:
        experts = get(block, site.path) if site.experts else None
        if experts is None:
            continue
        name, n_experts = f"{prefix}.{site.path}", len(getattr(experts, site.experts))
        if isinstance(fused := getattr(experts, _EXPERTS, None), Tensor) and fused.ndim == 3:
            matrices = [
                Matrix(experts, _EXPERTS, f"{name}.{_EXPERTS}[{i}]", d_model, i, not site.transposed)
                for i in range(n_experts)
            ]
            readers.append(Reader(name, layer, "mlp_input", experts, matrices, mlp_norm))
        readers += _routers(block, site.path, prefix, layer, n_experts, d_model, mlp_norm)
    return readers


def _norms(block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """What the stream goes through before attention and before the MLP; None where a block reads it as it is."""
    before = getattr(block, "input_layernorm", None) or getattr(block, "ln_1", None)
    if before is None:  # olmo2: only what is written is normalised
        return None, None
    for name in ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"):
        if (found := getattr(block, name, None)) is not None:
            return before, found
    return before, before  # cohere: attention and MLP side by side


def _linear(
    block: nn.Module, path: str, name: str, layer: int, component: str, d_model: int, norm: nn.Module | None
) -> Reader | None:
    module = get(block, path)
    if module is None:
        return None
    matrix = Matrix(module, "weight", f"{name}.weight", d_model, transposed=not isinstance(module, Conv1D))
    return Reader(name, layer, component, module, [matrix], norm)


def _routers(
    block: nn.Module, experts: str, prefix: str, layer: int, n_experts: int, d_model: int, norm: nn.Module | None
) -> list[Reader]:
    """What stands beside the experts and has a row of d_model weights for each."""
    beside = experts.rpartition(".")[0]
    parent = get(block, beside)
    if parent is None:
        return []
    found = []
    for name, module in parent.named_children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and tuple(weight.shape) == (n_experts, d_model):
            whole = f"{prefix}.{beside}.{name}"
            matrix = Matrix(module, "weight", f"{whole}.weight", d_model, transposed=True)
            found.append(Reader(whole, layer, "router", module, [matrix], norm))
    return found
