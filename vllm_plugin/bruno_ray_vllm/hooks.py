"""An edit as forward hooks on the modules that write to the residual stream. Needs torch alone, no vLLM.

A writer's output y (tokens, d) of a linear map, with b what the module itself adds to it, becomes

    y' = scale * ((y - b) - left^T (right (y - b))) + b          left, right (r, d); scale (d,), 1 where there is none

in float32. It is linear in y - b, so it does not matter whether it comes before or after the sum over the GPUs of
tensor parallelism, nor what multiplies a whole token later, such as a router's weight.

The tensors are buffers of the hooked module: they follow it to its device, torch.compile takes them as inputs of its
graph, and CUDA graphs find them at one address.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEFT, RIGHT, SCALE = "bruno_ray_left", "bruno_ray_right", "bruno_ray_scale"
BIAS_IN_OUTPUT = "bruno_ray_bias_in_output"
ELSEWHERE = "PPMissingLayer"
"""What vLLM puts in the place of blocks that another pipeline stage holds."""


@dataclass(frozen=True)
class Edit:
    """Of one writer."""

    left: Tensor
    right: Tensor
    scale: Tensor | None


def edits_of(tensors: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Module name -> edit, from the tensors ``NAME.left``, ``NAME.right`` and, where there is one, ``NAME.scale``."""
    names = sorted(key.removesuffix(".left") for key in tensors if key.endswith(".left"))
    return {
        name: Edit(tensors[f"{name}.left"], tensors[f"{name}.right"], tensors.get(f"{name}.scale")) for name in names
    }


def attach(model: nn.Module, edits: Mapping[str, Edit]) -> list[str]:
    """Hook every writer that this process holds; returns the names of their modules here.

    Raises:
        ValueError: a writer is not to be found, or not of the width of the edit. Nothing is hooked then.
    """
    found = {name: module_of(model, name, edit.left.shape[1]) for name, edit in edits.items()}
    for name, place in found.items():
        if place is not None:
            _hook(place[1], edits[name])
    return [place[0] for place in found.values() if place is not None]


def module_of(model: nn.Module, name: str, width: int) -> tuple[str, nn.Module] | None:
    """The module that transformers calls ``name``, with its name here; None if another pipeline stage holds it.

    It is called the same in most of vLLM's models. Of others, such as those that also see, vLLM's own table of names is
    asked, and then the one module of that width whose name ends alike from the number of the block on.
    """
    modules = dict(model.named_modules())
    names = [name, *_mapped(model, name)]
    for candidate in names:
        if candidate in modules:
            _require_width(candidate, modules[candidate], width)
            return candidate, modules[candidate]
    for candidate in names:
        parts = candidate.split(".")
        for end in range(1, len(parts)):
            above = modules.get(".".join(parts[:end]))
            if above is not None and type(above).__name__ == ELSEWHERE:
                return None
    tail = _from_block(name)
    alike = [(own, module) for own, module in modules.items() if own.endswith(tail) and width in _widths(module)]
    if len(alike) == 1:
        return alike[0]
    reason = "no module is called so" if not alike else f"it could be {' or '.join(own for own, _ in alike)}"
    raise ValueError(f"the edit's writer {name} is not to be found in vLLM's {type(model).__name__}: {reason}")


def _mapped(model: nn.Module, name: str) -> list[str]:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return []
    return [found.removesuffix(".weight") for found in mapper.apply_list([f"{name}.weight"])]


def _from_block(name: str) -> str:
    """``.layers.3.self_attn.o_proj`` of ``model.language_model.layers.3.self_attn.o_proj``."""
    parts = name.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=1)
    return "." + ".".join(parts[number - 1 :])


def _widths(module: nn.Module) -> set[int]:
    """How wide a linear module's output is, by the names that vLLM and torch have for it."""
    found = (getattr(module, attribute, None) for attribute in ("output_size", "out_features", "nf"))
    return {value for value in found if isinstance(value, int)}


def _require_width(name: str, module: nn.Module, width: int) -> None:
    widths = _widths(module)
    if not widths:
        raise ValueError(f"{name} is a {type(module).__name__} here, which is no linear map that can be edited")
    if width not in widths:
        raise ValueError(f"the edit is {width} wide and {name} writes {max(widths)}: it is for another model")


def _hook(module: nn.Module, edit: Edit) -> None:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    for attribute, tensor in ((LEFT, edit.left), (RIGHT, edit.right), (SCALE, edit.scale)):
        on_device = None if tensor is None else tensor.to(device, torch.float32)
        module.register_buffer(attribute, on_device, persistent=False)
    setattr(module, BIAS_IN_OUTPUT, _adds_bias(module))
    module.register_forward_hook(edit_output)


def _adds_bias(module: nn.Module) -> bool:
    """Whether the output holds the bias: not if vLLM returns it beside the output. Where outputs are summed over GPUs
    the first one adds it; before that sum only its output has it."""
    if getattr(module, "bias", None) is None or getattr(module, "skip_bias_add", False):
        return False
    return bool(getattr(module, "reduce_results", True)) or getattr(module, "tp_rank", 0) == 0


def edit_output(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """The hook: vLLM's linear modules return the output and a bias that somebody else adds, or the output alone."""
    if isinstance(output, tuple):
        return (edited(module, output[0]), *output[1:])
    return edited(module, output)


def edited(module: nn.Module, y: Tensor) -> Tensor:
    left, right, scale = getattr(module, LEFT), getattr(module, RIGHT), getattr(module, SCALE)
    exact = y.to(torch.float32)
    bias = module.bias.to(torch.float32) if getattr(module, BIAS_IN_OUTPUT) else None
    linear = exact if bias is None else exact - bias
    changed = linear - (linear @ right.T) @ left
    if scale is not None:
        changed = changed * scale
    if bias is not None:
        changed = changed + bias
    return changed.to(y.dtype)
