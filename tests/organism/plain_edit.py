"""A plain directional ablation, written out by hand from the formulas, to show that an organism is ablatable.

It shares no code with the product: difference-in-means at the last prompt position, strengths over layers as the
field searches them, and forward hooks that remove the component from what attention and the MLP write.
Axes: N prompt, L stream point (0 = embedding output), D d_model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlainEdit:
    """Two kernels over layers (attention, mlp) and where the direction comes from."""

    direction_index: float | None
    """Layer whose direction is used everywhere; None: every layer its own."""
    kernels: tuple[tuple[float, float, float, float], tuple[float, float, float, float]]
    """Per component: max weight, its position, min weight as a share of max, distance at which it is reached."""


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[str, Tensor]:
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in prompts
    ]
    return tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
        return_token_type_ids=False,
    )  # fmt: skip


@torch.inference_mode()
def residuals(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """Residual stream at the last prompt position, (N, L, D) float64.

    Read by hooks on the blocks, because the last of transformers' hidden states is already normed.
    """
    points: list[Tensor] = []

    def read_input(_module, arguments, keywords):
        points.append((arguments[0] if arguments else keywords["hidden_states"])[:, -1].double())

    def read_output(_module, _arguments, output):
        points.append((output[0] if isinstance(output, tuple) else output)[:, -1].double())

    layers = model.model.layers
    handles = [layers[0].register_forward_pre_hook(read_input, with_kwargs=True)]
    handles += [layer.register_forward_hook(read_output) for layer in layers]
    try:
        model(**encode(tokenizer, prompts), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(points, dim=1)


def difference_in_means(target_NLD: Tensor, baseline_NLD: Tensor, projected: bool) -> Tensor:
    """Unit directions (L, D); ``projected`` keeps only what is orthogonal to the baseline mean."""
    baseline_LD = baseline_NLD.mean(0)
    direction_LD = torch.nn.functional.normalize(target_NLD.mean(0) - baseline_LD, dim=-1)
    if projected:
        unit_LD = torch.nn.functional.normalize(baseline_LD, dim=-1)
        direction_LD = direction_LD - (direction_LD * unit_LD).sum(-1, keepdim=True) * unit_LD
    return torch.nn.functional.normalize(direction_LD, dim=-1)


def strength(kernel: tuple[float, float, float, float], layer: int) -> float:
    """Linear from the maximum at its position to the minimum at the distance, nothing beyond."""
    max_weight, position, min_share, reach = kernel
    distance = abs(layer - position)
    if distance > reach:
        return 0.0
    return max(max_weight, 0.0) * (1 + (min_share - 1) * distance / reach)


def directions_of(edit: PlainEdit, directions_LD: Tensor) -> Tensor:
    """One direction per block: block l writes stream point l + 1."""
    if edit.direction_index is None:
        return directions_LD[1:]
    low = math.floor(edit.direction_index)
    share = edit.direction_index - low
    high = min(low + 2, len(directions_LD) - 1)
    mixed_D = (1 - share) * directions_LD[low + 1] + share * directions_LD[high]
    return torch.nn.functional.normalize(mixed_D, dim=-1).expand(len(directions_LD) - 1, -1)


@contextlib.contextmanager
def edited(model: PreTrainedModel, edit: PlainEdit, directions_LD: Tensor) -> Iterator[None]:
    """Within the block, every writer's output y becomes y - weight * v <v, y>."""
    handles = []
    for layer, (block, direction_D) in enumerate(zip(model.model.layers, directions_of(edit, directions_LD))):
        for module, kernel in zip((block.self_attn.o_proj, block.mlp.down_proj), edit.kernels):
            weight = strength(kernel, layer)
            if weight:
                unit_D = direction_D.to(module.weight.dtype)

                def remove(_module, _arguments, output, unit_D=unit_D, weight=weight):
                    return output - weight * (output @ unit_D)[..., None] * unit_D

                handles.append(module.register_forward_hook(remove))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def first_token_logprobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """Log-probabilities of the first answer token, (N, vocabulary) float64."""
    logits = model(**encode(tokenizer, prompts), use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.double().log_softmax(-1)


def kl_divergence(original_NV: Tensor, edited_NV: Tensor) -> float:
    """Mean KL(original || edited) in nats."""
    return (original_NV.exp() * (original_NV - edited_NV)).sum(-1).mean().item()


def suggest(trial, n_layers: int) -> PlainEdit:
    """The ordinary search range (last layer index = n_layers - 1)."""
    last = n_layers - 1
    per_layer = trial.suggest_categorical("direction_scope", ["global", "per layer"]) == "per layer"
    index = trial.suggest_float("direction_index", 0.4 * last, 0.9 * last)
    kernels = []
    for component, lowest in (("attention", 0.8), ("mlp", -0.25)):
        kernels.append(
            (
                trial.suggest_float(f"{component}.max_weight", lowest, 1.5),
                trial.suggest_float(f"{component}.position", 0.6 * last, 1.0 * last),
                trial.suggest_float(f"{component}.min_weight", 0.0, 1.0),
                trial.suggest_float(f"{component}.distance", 1.0, max(0.6 * last, 1.0)),
            )
        )
    return PlainEdit(None if per_layer else index, tuple(kernels))
