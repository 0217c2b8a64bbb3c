"""A model seen as blocks around a residual stream, with the weights that write to it."""

import math
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bruno_ray.errors import ModelError
from bruno_ray.model.families import FAMILIES, Site
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
            f" {_describe(model, config.hidden_size)}."
            " Add a row to FAMILIES in bruno_ray/model/families.py"
        )
    names = {id(module): name for name, module in model.named_modules()}
    writers = []
    for layer, block in enumerate(blocks):
        found = [
            make_writer(site, module, names[id(module)], layer, config.hidden_size)
            for site in family.sites
            if (module := _get(block, site.path)) is not None
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
    return Architecture(
        family=config.model_type,
        layers=list(blocks),
        embedding=stack.get_submodule(family.embedding),
        final_norm=stack.get_submodule(family.final_norm),
        writers=writers,
        d_model=config.hidden_size,
        other_embeddings=[stack.get_submodule(path) for path in family.other_embeddings],
    )


def make_writer(site: Site, module: nn.Module, name: str, layer: int, d_model: int) -> Writer:
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
        stacked = fused.shape[0] if site.stacked else 1
        return Writer(name, layer, site.component, module, matrices, bias=None, stacked=stacked)
    width = module.nf if isinstance(module, Conv1D) else module.out_features
    if width != d_model:
        raise ModelError(f"{name} writes {width} values, not the {d_model} of the residual stream; its row is wrong")
    parameter = next((one for one in PACKED if getattr(module, one, None) is not None), "weight")
    matrix = Matrix(module, parameter, f"{name}.weight", d_model, transposed=isinstance(module, Conv1D))
    return Writer(name, layer, site.component, module, [matrix], getattr(module, "bias", None))


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
