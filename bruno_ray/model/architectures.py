"""Where each model family keeps the modules that write to the residual stream.

``FAMILIES`` is data: one row per family, found by the text model's ``model_type``. A row names the modules around
the blocks and the *sites* inside a block, relative to it. Layers of one model may differ (hybrids with linear
attention, dense layers between mixtures of experts): each block has those of its family's sites that exist in it,
and must have at least one for attention and one for the MLP.

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

import math
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bruno_ray.errors import ModelError
from bruno_ray.model.writers import Matrix, Writer


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


@dataclass(frozen=True)
class Family:
    """One row of the table. ``stacks`` are paths of the text model from the root, first match wins."""

    sites: tuple[Site, ...]
    stacks: tuple[str, ...] = ("model.language_model", "model")
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    other_embeddings: tuple[str, ...] = ()


_ATTENTION = Site("attention", "self_attn.o_proj")
_LINEAR_ATTENTION = Site("attention", "linear_attn.out_proj")
_MLP = Site("mlp", "mlp.down_proj")
_EXPERTS = Site("mlp", "mlp.experts", experts="down_proj")
_SHARED_EXPERT = Site("mlp", "mlp.shared_expert.down_proj")

_DENSE = Family((_ATTENTION, _MLP))
_MOE = Family((_ATTENTION, _MLP, _EXPERTS, _SHARED_EXPERT))
_HYBRID = Family((_ATTENTION, _LINEAR_ATTENTION, _MLP, _EXPERTS, _SHARED_EXPERT))

FAMILIES: dict[str, Family] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "ministral3": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "gemma": _DENSE,
    "gemma2": _DENSE,
    "gemma3_text": _DENSE,
    # per_layer_projection (a gated third write of some sizes) is left alone; coverage() shows it
    "gemma4_text": Family((_ATTENTION, _MLP, Site("mlp", "experts", experts="down_proj"))),
    "phi3": _DENSE,
    "olmo2": _DENSE,
    "olmo3": _DENSE,
    "granite": _DENSE,
    "smollm3": _DENSE,
    "cohere2": _DENSE,
    "glm4": _DENSE,
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
    "mixtral": _MOE,
    "olmoe": _MOE,
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "qwen3_next": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "gpt_oss": Family(
        (
            _ATTENTION,
            Site("mlp", "mlp.experts", experts="down_proj", transposed=True, experts_bias="down_proj_bias"),
        )
    ),
    "granitemoe": Family((_ATTENTION, Site("mlp", "block_sparse_moe.experts", experts="down_proj"))),
    "deepseek_v3": Family((_ATTENTION, _MLP, _EXPERTS, Site("mlp", "mlp.shared_experts.down_proj"))),
    "glm4_moe": Family((_ATTENTION, _MLP, _EXPERTS, Site("mlp", "mlp.shared_experts.down_proj"))),
}


# ----- what was found in one model -----


@dataclass(frozen=True)
class Architecture:
    """A model seen as blocks around a residual stream."""

    family: str
    layers: list[nn.Module]
    embedding: nn.Module
    final_norm: nn.Module
    writers: list[Writer]
    d_model: int
    other_embeddings: list[nn.Module] = field(default_factory=list)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components, in the order of a block."""
        return tuple(dict.fromkeys(writer.component for writer in self.writers))


def find_architecture(model: nn.Module) -> Architecture:
    """Look the model up in the table. Raises ModelError that shows what the first unexplained block holds."""
    config = model.config.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type)
    stack = next((found for path in family.stacks if (found := _get(model, path))), None) if family else None
    blocks = _get(stack, family.blocks) if family and stack is not None else None
    if family is None or stack is None or not blocks:
        raise ModelError(
            f"model type {config.model_type!r} ({type(model).__name__}) is not in the table of architectures."
            f" {_describe(model, config.hidden_size)}. Known: {', '.join(FAMILIES)}."
            " Add a row to FAMILIES in bruno_ray/model/architectures.py"
        )
    names = {id(module): name for name, module in model.named_modules()}
    writers = []
    for layer, block in enumerate(blocks):
        found = [
            _writer(site, module, names[id(module)], layer, config.hidden_size)
            for site in family.sites
            if (module := _get(block, site.path)) is not None
        ]
        missing = {"attention", "mlp"} - {writer.component for writer in found}
        if missing:
            raise ModelError(
                f"layer {layer} of this {config.model_type} model has no {' and no '.join(sorted(missing))} where the"
                f" table expects it ({', '.join(site.path for site in family.sites)})."
                f" {_describe_block(block, config.hidden_size)}."
                " Add a row to FAMILIES in bruno_ray/model/architectures.py"
            )
        writers += found
    return Architecture(
        family=config.model_type,
        layers=list(blocks),
        embedding=stack.get_submodule(family.embedding),
        final_norm=stack.get_submodule(family.final_norm),
        writers=writers,
        d_model=config.hidden_size,
        other_embeddings=[stack.get_submodule(path) for path in family.other_embeddings],
    )


def _writer(site: Site, module: nn.Module, name: str, layer: int, d_model: int) -> Writer:
    if site.experts:
        fused = getattr(module, site.experts, None)
        if not isinstance(fused, Tensor) or fused.ndim != 3:
            raise ModelError(
                f"{name} ({type(module).__name__}) keeps its experts in no 3-D tensor {site.experts}:"
                " load an unquantised copy of the model"
            )
        matrices = [
            Matrix(module, site.experts, f"{name}.{site.experts}[{i}]", d_model, i, site.transposed)
            for i in range(fused.shape[0])
        ]
        if site.experts_bias:
            matrices.append(Matrix(module, site.experts_bias, f"{name}.{site.experts_bias}", d_model, transposed=True))
        return Writer(name, layer, site.component, module, matrices, bias=None)
    width = module.nf if isinstance(module, Conv1D) else module.out_features
    if width != d_model:
        raise ModelError(f"{name} writes {width} values, not the {d_model} of the residual stream; its row is wrong")
    matrix = Matrix(module, "weight", f"{name}.weight", d_model, transposed=isinstance(module, Conv1D))
    return Writer(name, layer, site.component, module, [matrix], getattr(module, "bias", None))


# ----- what the edit reaches -----


# ----- looking around in modules -----


def _get(root: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        root = getattr(root, part, None)  # type: ignore[assignment]
        if root is None:
            return None
    return root


def gives(module: nn.Module, d_model: int) -> bool:
    if isinstance(module, nn.Linear):
        return module.out_features == d_model and module.in_features != d_model
    return isinstance(module, Conv1D) and module.nf == d_model and module.nx != d_model


def _describe(model: nn.Module, d_model: int) -> str:
    """The longest module list is taken to be the blocks."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return "It has no list of blocks"
    name, blocks = max(lists, key=lambda item: (len(item[1]), sum(p.numel() for p in item[1].parameters())))
    return f"Blocks seem to be {name} ({len(blocks)}). {_describe_block(blocks[0], d_model)}"


def _describe_block(block: nn.Module, d_model: int) -> str:
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
    writing = ", ".join(
        f"{name} {tuple(parameter.shape)}"
        for name, parameter in block.named_parameters()
        if parameter.ndim >= 2 and d_model in (parameter.shape[0], parameter.shape[-2]) and math.prod(parameter.shape)
    )
    return f"A block holds {children}; its weights that could write {d_model} values are {writing or 'none'}"
