"""Which experts and heads an edit should be of: how tokens are routed, and what each head does along a direction.

Padding never counts. Tensors are float32 on the CPU.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import routing_of
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.lean_forward import own_forward
from bruno_ray.model.batching import TokenBudget, map_batches, pad_left
from bruno_ray.model.writers import Writer

HEADS_AT_ONCE = 16
"""Heads that are left out in one batch, each in rows of its own."""

LayerPart = tuple[int, ...] | None


@dataclass(frozen=True)
class Routing:
    """Where the tokens of some prompts are sent."""

    shares: tuple[tuple[float, ...] | None, ...]
    """Per layer and expert the share of the tokens that are sent to it, which sum to the experts per token; None for a
    layer without a mixture."""

    def entropy(self) -> float | None:
        """Of the distribution of tokens over a layer's experts, as a share of that of even use, mean over layers: 1
        where all experts get as many tokens, 0 where one gets all. None without a mixture."""
        layers = [shares for shares in self.shares if shares is not None]
        return sum(map(_evenness, layers)) / len(layers) if layers else None


def _evenness(shares: Sequence[float]) -> float:
    total = sum(shares)
    return -sum(share / total * math.log(share / total) for share in shares if share > 0) / math.log(len(shares))


def target_experts(target: Routing, baseline: Routing) -> tuple[LayerPart, ...]:
    """Per layer the experts that a larger share of the target prompts' tokens is sent to than of the baseline's."""
    return tuple(
        None if mine is None or theirs is None else tuple(i for i, (a, b) in enumerate(zip(mine, theirs)) if a > b)
        for mine, theirs in zip(target.shares, baseline.shares)
    )


@torch.no_grad()
def routing(engine: BatchEngine, ids: Sequence[Sequence[int]], edit: ResolvedEdit | None = None) -> Routing:
    """How the model routes all tokens of some prompts, under an edit.

    Raises ModelError for a mixture whose experts are called in a way that does not show it.
    """
    writers = {i: writer for i, writer in enumerate(engine.loaded.architecture.writers) if writer.experts}
    if not writers:
        return Routing((None,) * engine.loaded.architecture.n_layers)
    counts = {i: torch.zeros(writer.experts, dtype=torch.long) for i, writer in writers.items()}

    def sent(i: int, args: tuple) -> Tensor:
        return routing_of(writers[i], args)[0].cpu()

    n_tokens = 0
    for batch in _passes(engine, ids, [edit] * len(ids), {i: (writers[i].module, sent) for i in writers}):
        n_tokens += int(batch.mask_BT.sum())
        for i, index_NK in batch.seen.items():
            mine = index_NK[batch.mask_BT.flatten()]
            mine = mine[mine < writers[i].experts]  # a place that stays empty may be numbered one too high
            counts[i] += torch.bincount(mine, minlength=writers[i].experts)
    shares: list[tuple[float, ...] | None] = [None] * engine.loaded.architecture.n_layers
    for i, writer in writers.items():
        shares[writer.layer] = tuple((counts[i] / n_tokens).tolist())
    return Routing(tuple(shares))


def chosen_heads(scores: Sequence[Sequence[float] | None], share: float) -> tuple[LayerPart, ...]:
    """The heads of the highest scores, ``share`` of all and one at least; by layer, None where there are none."""
    ranked = sorted(
        ((score, layer, head) for layer, mine in enumerate(scores) for head, score in enumerate(mine or ())),
        reverse=True,
    )
    best = {(layer, head) for _, layer, head in ranked[: max(1, round(share * len(ranked)))]}
    return tuple(
        None if mine is None else tuple(head for head in range(len(mine)) if (layer, head) in best)
        for layer, mine in enumerate(scores)
    )


@torch.no_grad()
def head_projections(
    engine: BatchEngine,
    target: Sequence[Sequence[int]],
    baseline: Sequence[Sequence[int]],
    directions_Prd: Float[Tensor, "P r d"],
) -> list[list[float] | None]:
    """By layer and head: how much more it writes along the layer's first direction at the last token of target prompts
    than of baseline prompts."""
    found: list[list[float] | None] = [None] * engine.loaded.architecture.n_layers
    means = [_mean_inputs(engine, ids) for ids in (target, baseline)]
    for i, writer in _with_heads(engine).items():
        read = directions_Prd[writer.layer + 1, 0].float().cpu() @ writer.weights()[0].cpu()
        along = (read * (means[0][i] - means[1][i])).view(writer.heads, -1).sum(1)
        found[writer.layer] = along.tolist()
    return found


def _mean_inputs(engine: BatchEngine, ids: Sequence[Sequence[int]]) -> dict[int, Float[Tensor, " in"]]:
    """Of each output projection with heads, at the last token."""
    writers = _with_heads(engine)
    sums = {i: torch.zeros(()) for i in writers}

    def last(i: int, args: tuple) -> Tensor:
        return args[0].flatten(2)[:, -1].float().cpu()

    for batch in _passes(engine, ids, [None] * len(ids), {i: (writer.module, last) for i, writer in writers.items()}):
        for i, inputs in batch.seen.items():
            sums[i] = sums[i] + inputs.sum(0)
    return {i: total / len(ids) for i, total in sums.items()}


@torch.no_grad()
def head_effects(
    engine: BatchEngine, target: Sequence[Sequence[int]], bank: DirectionBank, name: str
) -> list[list[float] | None]:
    """By layer and head: how much less there is along the first direction of the set ``name`` behind the last layer, at
    the last token of target prompts, when this head alone does not write along it."""
    architecture = engine.loaded.architecture
    heads = [(writer.layer, head) for writer in _with_heads(engine).values() for head in range(writer.heads)]
    whole = AblationParameters(1.0, 0.0, 1.0, float(architecture.n_layers))

    def alone(layer: int, head: int) -> Edit:
        part = tuple((head,) if other == layer else () for other in range(architecture.n_layers))
        return Edit({"attention": whole}, name, None, "none", {"attention": part})

    last = bank[name][-1, 0].float()
    before = _along(engine, target, [None], last)[0]
    found: list[list[float] | None] = [None] * architecture.n_layers
    for writer in _with_heads(engine).values():
        found[writer.layer] = [0.0] * writer.heads
    for start in range(0, len(heads), HEADS_AT_ONCE):
        some = heads[start : start + HEADS_AT_ONCE]
        edits = engine.editor.resolve_all([alone(*head) for head in some], bank)
        for (layer, head), after in zip(some, _along(engine, target, edits, last)):
            mine = found[layer]
            assert mine is not None
            mine[head] = before - after
    return found


def _along(
    engine: BatchEngine, ids: Sequence[Sequence[int]], edits: Sequence[ResolvedEdit | None], v: Float[Tensor, " d"]
) -> list[float]:
    """Mean over prompts of what is along ``v`` behind the last layer at the last token, for each edit."""

    def last(i: int, args: tuple) -> Tensor:
        return args[0][:, -1].float().cpu() @ v

    rows = [list(sequence) for _ in edits for sequence in ids]
    sums = [0.0] * len(edits)
    hooked = {0: (engine.loaded.architecture.final_norm, last)}
    for batch in _passes(engine, rows, [edit for edit in edits for _ in ids], hooked):
        for row, value in zip(batch.rows, batch.seen[0].tolist()):
            sums[row // len(ids)] += value / len(ids)
    return sums


def _with_heads(engine: BatchEngine) -> dict[int, Writer]:
    return {i: writer for i, writer in enumerate(engine.loaded.architecture.writers) if writer.heads}


Read = Callable[[int, tuple], Tensor]


@dataclass(frozen=True)
class _Pass:
    """What was seen in one forward pass."""

    rows: list[int]
    mask_BT: Bool[Tensor, "B T"]
    seen: dict[int, Tensor]


def _passes(
    engine: BatchEngine,
    ids: Sequence[Sequence[int]],
    edits: Sequence[ResolvedEdit | None],
    hooked: Mapping[int, tuple[nn.Module, Read]],
) -> Iterator[_Pass]:
    """Every row once, each under its edit, in batches; of each hooked module what is read of its arguments."""
    seen: dict[int, Tensor] = {}

    def reading(i: int, read: Read) -> Callable:
        def note(module: nn.Module, args: tuple) -> None:
            seen[i] = read(i, args)

        return note

    def forward(batch: list[int]) -> _Pass:
        seen.clear()  # of a pass that memory was too short for
        padded = pad_left([ids[row] for row in batch], 0, engine.device)
        mine = [edits[row] for row in batch]
        kept = list({id(edit): edit for edit in mine}.values())
        places = {id(edit): k for k, edit in enumerate(kept)}
        engine.editor.set(kept, [places[id(edit)] for edit in mine])
        try:
            own_forward(engine.model, padded.input_ids, padded.attention_mask, padded.position_ids, None, 1)
        finally:
            engine.editor.clear()
        return _Pass(batch, padded.attention_mask.bool().cpu(), dict(seen))

    handles = [module.register_forward_pre_hook(reading(i, read)) for i, (module, read) in hooked.items()]
    try:
        for _, done in map_batches(forward, [len(each) for each in ids], TokenBudget.for_device(engine.device)):
            yield done
    finally:
        for handle in handles:
            handle.remove()
