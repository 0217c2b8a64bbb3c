"""A model seen as blocks around a residual stream, with the weights that write to it."""

import math
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from bruno_ray.errors import ModelError
from bruno_ray.model.families import FAMILIES, Site
from bruno_ray.model.modules import get
from bruno_ray.model.read_sites import find_readers
from bruno_ray.model.readers import Reader
from bruno_ray.model.writers import Matrix, Writer

PACKED = ("qweight", "weight_packed")
"""What modules of packed formats (GPTQ, AWQ, compressed-tensors) hold in place of a weight."""


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
    probed: bool = False
    """Found by watching the model compute, not by its row in the table."""

    readers: list[Reader] = field(default_factory=list)
    """Weights that read the residual stream; empty where the family is in no table of them."""

    @property
    def sites(self) -> list[Writer | Reader]:
        """What an edit can change, in the order of its factors."""
        return [*self.writers, *self.readers]

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
    stack = next((found for path in family.stacks if (found := get(model, path))), None) if family else None
    blocks = get(stack, family.blocks) if family and stack is not None else None
    if family is None or stack is None or not blocks:
        raise ModelError(
            f"model type {config.model_type!r} ({type(model).__name__}) is not in the table of architectures."
            f" {_describe(model, config.hidden_size)}."
            " Add a row to FAMILIES in bruno_ray/model/families.py"
        )
    names = {id(module): name for name, module in model.named_modules()}
    writers: list[Writer] = []
    readers: list[Reader] = []
    for layer, block in enumerate(blocks):
        found = [
            make_writer(site, module, names[id(module)], layer, config.hidden_size, heads_of(block, site, config))
            for site in family.sites
            if (module := get(block, site.path)) is not None
        ]
        missing = {"attention", "mlp"} - {writer.component for writer in found}
        if missing and (family.every_layer_has_both or not found):
            raise ModelError(
                f"layer {layer} of this {config.model_type} model has no {' and no '.join(sorted(missing))} where the"
                f" table expects it ({', '.join(site.path for site in family.sites)})."
                f" {_describe_block(block, config.hidden_size)}."
                " Add a row to FAMILIES in bruno_ray/model/families.py"
            )
        writers += found
        readers += find_readers(config.model_type, family, layer, block, names[id(block)], config.hidden_size)
    return Architecture(
        family=config.model_type,
        layers=list(blocks),
        embedding=stack.get_submodule(family.embedding),
        final_norm=stack.get_submodule(family.final_norm),
        writers=writers,
        d_model=config.hidden_size,
        other_embeddings=[stack.get_submodule(path) for path in family.other_embeddings],
        readers=readers,
    )


ATTENTION_WITH_HEADS = ("self_attn", "attn", "attention")
"""First part of the paths of output projections whose columns are attention heads; other mixers of tokens have none."""


def heads_of(block: nn.Module, site: Site, config: PreTrainedConfig) -> int:
    """Heads whose outputs a site's weight reads, block by block; 0 if it is no attention. Of grouped-query attention
    these are the query heads: their outputs are apart, however many share keys and values."""
    path, _, _ = site.path.rpartition(".")
    if site.component != "attention" or path not in ATTENTION_WITH_HEADS:
        return 0
    module = get(block, site.path)
    n_heads = getattr(get(block, path), "num_heads", None) or getattr(config, "num_attention_heads", 0)
    width = getattr(module, "nx", None) or getattr(module, "in_features", 0)
    return n_heads if isinstance(n_heads, int) and n_heads and width % n_heads == 0 else 0


def make_writer(site: Site, module: nn.Module, name: str, layer: int, d_model: int, heads: int = 0) -> Writer:
    """The weights that a module writes with. Raises ModelError if the site's row does not fit the module."""
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
        n_experts = fused.shape[0]
        parts = {"stacked": n_experts} if site.stacked else {"experts": n_experts}
        return Writer(name, layer, site.component, module, matrices, None, **parts)
    width = module.nf if isinstance(module, Conv1D) else module.out_features
    if width != d_model:
        raise ModelError(f"{name} writes {width} values, not the {d_model} of the residual stream; its row is wrong")
    parameter = next((one for one in PACKED if getattr(module, one, None) is not None), "weight")
    matrix = Matrix(module, parameter, f"{name}.weight", d_model, transposed=isinstance(module, Conv1D))
    return Writer(name, layer, site.component, module, [matrix], getattr(module, "bias", None), heads=heads)


# ----- looking around in modules -----


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
