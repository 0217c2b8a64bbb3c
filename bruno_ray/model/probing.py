"""Find where a model writes to the residual stream by watching it compute; for families without a row in the table.

One forward pass over random tokens is recorded. In each block, candidates are the modules that put out d_model values:
linear ones, and mixtures of experts in fused parameters. What the block adds to the residual stream, token by token,
must then be a sum of candidates' outputs, each times a number per token (gates, routers, residual multipliers), or of
norms' outputs whose inputs are such sums (a gain per channel after the write). The candidates that take part are the
block's writers. An edit of their outputs commutes with numbers per token and is exact; whatever else a block does to
its stream leaves a rest here, and the model is refused.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import Architecture, make_writer
from bruno_ray.model.batching import input_device
from bruno_ray.model.families import Site
from bruno_ray.model.writers import Writer

TOKENS = (2, 7)
"""Rows and columns of the probe."""

PART_TAKEN = 1e-3
"""Share of what a block adds from which a candidate counts as one of its writers."""

REST = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Norm of what stays unexplained, relative to what a block adds: rounding of the sums in that dtype."""

ATTENTION = re.compile(r"attn|attention|mamba|conv|ssm|recurrent|temporal|mixer\.o")
WRITES = re.compile(r"down|w2|output|wo$")
MIXER_OF_STATES = re.compile(r"(^|[._])(mlp|ffn|feed_forward|experts?|moe)([._]|$)")


@dataclass
class Recorded:
    """One call of a module: what came in and what went out."""

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Float[Tensor, "tokens d_model"]
    """Of experts that put out one part each: the sum of the parts."""

    parts: int = 1


@dataclass
class _Block:
    module: nn.Module
    before: Tensor | None = None
    after: Tensor | None = None
    calls: dict[str, list[Recorded]] = field(default_factory=dict)


def probe(model: PreTrainedModel) -> tuple[Architecture, dict[str, Recorded]]:
    """The architecture as the model's own computation shows it, and what each writer was given, by its name.

    Raises ModelError that says in one line why the model cannot be edited.
    """
    config = model.config.get_text_config(decoder=True)
    kind, d_model = config.model_type, config.hidden_size
    stack, blocks = _stack(model, config)
    recorded, norms = _record(model, stack, blocks, d_model)
    names = {id(module): name for name, module in model.named_modules()}
    writers: list[Writer] = []
    given: dict[str, Recorded] = {}
    for layer, block in enumerate(recorded):
        sites = _sites(block, kind, layer, d_model)
        for site in sites:
            module = block.module.get_submodule(site.path)
            writers.append(make_writer(site, module, names[id(module)], layer, d_model))
            given[names[id(module)]] = block.calls[site.path][0]
    if len({id(writer.module) for writer in writers}) < len(writers):
        raise ModelError(f"layers of this {kind} model share their weights: an edit of one would be an edit of all")
    if len(norms) != 1:
        raise ModelError(f"this {kind} model has {len(norms)} norms after its last block, not one")
    architecture = Architecture(
        family=kind,
        layers=blocks,
        embedding=model.get_input_embeddings(),
        final_norm=norms[0],
        writers=writers,
        d_model=d_model,
        probed=True,
    )
    return architecture, given


def _stack(model: PreTrainedModel, config: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The text model and its list of blocks: as many as the config says there are layers."""
    stack = model.get_decoder()
    lists = [module for module in stack.modules() if isinstance(module, nn.ModuleList)]
    fitting = [blocks for blocks in lists if len(blocks) == config.num_hidden_layers]
    if not fitting:
        raise ModelError(f"no list of {config.num_hidden_layers} blocks in this {config.model_type} model")
    return stack, list(max(fitting, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))


@torch.no_grad()
def _record(
    model: PreTrainedModel, stack: nn.Module, blocks: list[nn.Module], d_model: int
) -> tuple[list[_Block], list[nn.Module]]:
    """Run the probe. Second: modules of the stack, outside the blocks, that read what the last block put out."""
    recorded = [_Block(block) for block in blocks]
    inside = {id(module) for block in blocks for module in block.modules()}
    after: list[nn.Module] = []
    current: list[_Block] = []
    hooks = []

    def opens(block: _Block) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            current.append(block)
            found = _stream([*arguments, *keywords.values()], d_model)
            block.before = None if found is None else found.detach().clone()

        return hook

    def closes(block: _Block) -> Any:
        def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            current.pop()
            found = _stream(output if isinstance(output, tuple) else [output], d_model)
            block.after = None if found is None else found.detach().clone()

        return hook

    def inner(path: str) -> Any:
        def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            found = _stream(output if isinstance(output, tuple) else [output], d_model)
            if current and found is not None:
                parts, rest = divmod(found.numel(), TOKENS[0] * TOKENS[1] * d_model)
                if rest == 0 and (parts == 1 or parts == n_experts(module, d_model)):
                    summed = found.detach().double().reshape(parts, -1, d_model).sum(0)
                    current[-1].calls.setdefault(path, []).append(Recorded((arguments, keywords), summed, parts))

        return hook

    def outer(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found = _stream([*arguments, *keywords.values()], d_model)
        last = recorded[-1].after
        if found is not None and last is not None and found.shape == last.shape and torch.equal(found, last):
            after.append(module)

    for block in recorded:
        hooks += [
            block.module.register_forward_pre_hook(opens(block), with_kwargs=True),
            block.module.register_forward_hook(closes(block), with_kwargs=True),
        ]
        for path, module in block.module.named_modules():
            if path and (_writes(module, d_model) or is_norm(module, d_model)):
                hooks.append(module.register_forward_hook(inner(path), with_kwargs=True))
    for module in stack.modules():
        if id(module) not in inside and is_norm(module, d_model):
            hooks.append(module.register_forward_pre_hook(outer, with_kwargs=True))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(200, model.config.get_text_config().vocab_size), TOKENS, generator=generator)
    try:
        model(input_ids=ids.to(input_device(model.get_input_embeddings())))
    finally:
        for hook in hooks:
            hook.remove()
    return recorded, after


def _stream(values: Any, d_model: int) -> Tensor | None:
    """The first tensor that could be the residual stream or a write to it."""
    return next((v for v in values if isinstance(v, Tensor) and v.ndim in (2, 3) and v.shape[-1] == d_model), None)


# ----- which candidates add up -----


def _sites(block: _Block, kind: str, layer: int, d_model: int) -> list[Site]:
    if block.before is None or block.after is None or block.before.shape != block.after.shape:
        raise ModelError(
            f"layer {layer} of this {kind} model does not carry one residual stream of {d_model} values per token"
        )
    added = (block.after.double() - block.before.double()).reshape(-1, d_model)
    parts = {path: calls[0].output for path, calls in block.calls.items() if len(calls) == 1}
    writers, rest = _written(added, parts, block, d_model)
    dtype = block.after.dtype
    if rest > REST.get(dtype, REST[torch.float32]) or not writers:
        raise ModelError(
            f"what layer {layer} of this {kind} model adds to the residual stream is no sum of outputs of linear"
            f" modules ({rest:.0%} of it stays unexplained): it cannot be edited"
        )
    return [
        _site(block.module.get_submodule(path), path, kind, d_model, block.calls[path][0].parts > 1)
        for path in dict.fromkeys(writers)
    ]


def _written(
    whole: Float[Tensor, "tokens d_model"], parts: dict[str, Tensor], block: _Block, d_model: int
) -> tuple[list[str], float]:
    """The modules whose outputs add up to the whole, norms followed back to what they were given, and what is left."""
    taken, rest = _decomposed(whole, parts)
    writers = []
    for path in taken:
        if not is_norm(block.module.get_submodule(path), d_model):
            writers.append(path)
            continue
        arguments, keywords = block.calls[path][0].inputs
        before = _stream([*arguments, *keywords.values()], d_model)
        others = {name: part for name, part in parts.items() if name != path}
        if before is None:
            return writers, 1.0
        found, left = _written(before.double().reshape(-1, d_model), others, block, d_model)
        writers += found
        rest = max(rest, left)
    return writers, rest


def _decomposed(whole: Float[Tensor, "tokens d_model"], parts: dict[str, Tensor]) -> tuple[list[str], float]:
    """Which parts, each times a number per token, add up to the whole, and the share of it that they leave."""
    size = whole.norm()
    if not parts or size == 0:
        return [], 1.0
    if len(parts) >= whole.shape[1]:
        return [], 1.0
    matrix = torch.stack(list(parts.values()), dim=-1).cpu()
    whole = whole.cpu()
    numbers = torch.linalg.lstsq(matrix, whole.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    rest = (whole - (matrix @ numbers.unsqueeze(-1)).squeeze(-1)).norm() / size
    shares = (matrix * numbers.unsqueeze(1)).norm(dim=(0, 1)) / size
    return [path for path, share in zip(parts, shares) if share > PART_TAKEN], float(rest)


def is_norm(module: nn.Module, d_model: int) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and (weight is None or tuple(weight.shape) == (d_model,))


def _writes(module: nn.Module, d_model: int) -> bool:
    if isinstance(module, nn.Linear):
        return module.out_features == d_model
    if isinstance(module, Conv1D):
        return module.nf == d_model
    return _fused(module, d_model) is not None


def _fused(module: nn.Module, d_model: int) -> str | None:
    """The parameter of fused experts that writes."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and d_model in parameter.shape[1:] and WRITES.search(name) and "gate" not in name:
            return name
    return None


def n_experts(module: nn.Module, d_model: int) -> int:
    """Of a module with fused experts; 0 for others."""
    name = _fused(module, d_model)
    return 0 if name is None else getattr(module, name).shape[0]


def _site(module: nn.Module, path: str, kind: str, d_model: int, stacked: bool) -> Site:
    component = "attention" if ATTENTION.search(path) and not MIXER_OF_STATES.search(path) else "mlp"
    name = _fused(module, d_model)
    if isinstance(module, (nn.Linear, Conv1D)) or name is None:
        return Site(component, path)
    shape = getattr(module, name).shape
    if shape[1] == shape[2]:
        raise ModelError(f"the experts {path} of this {kind} model are square: which side writes cannot be told")
    bias = f"{name}_bias"
    return Site(
        component,
        path,
        experts=name,
        transposed=shape[2] == d_model,
        experts_bias=bias if getattr(module, bias, None) is not None else "",
        stacked=stacked,
    )
