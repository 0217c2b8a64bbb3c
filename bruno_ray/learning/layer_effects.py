"""Which layer's direction causes the behaviour: each candidate is tried on the model, before any search.

Of a direction set, the direction of one layer is a candidate. Two selections from the literature, both on the
behaviour's own tokens, no answer generated per candidate:

* causal (Arditi et al. 2024, https://arxiv.org/abs/2406.11717, appendix C): with the direction taken out everywhere,
  the target prompts' log-odds of the behaviour (`bypass`, low is good); with it added at its layer, the baseline
  prompts' log-odds (`induce`, above 0); and the KL divergence of the baseline prompts' next token (`kl`, at most 0.1).
  Of the candidates that pass, in the first four fifths of the layers, the one with the lowest bypass.
* COSMIC (Siu et al. 2025, https://arxiv.org/abs/2506.00085): cos(baseline + direction, target) + cos(target without it,
  baseline) of mean residuals at the tenth of the stream points where the two sides are least alike. It reads no token.

The paper's refusal tokens are written by hand for each model, and stand first in an answer. Here they are learnt from
the unedited model's answers (``losses.behaviour_tokens``), and looked for where the first of them stands: a prompt goes
with the answer's opening up to there ("the potion is" before "closed").

Shapes: K candidates, P prompts, L stream points (``residuals/extraction.py``), D d_model, V vocabulary.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.ablation.closed_forms import DirectionBank, mixture
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.errors import PromptError
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.lean_forward import own_forward
from bruno_ray.learning.losses import behaviour_tokens
from bruno_ray.model.batching import TokenBudget, map_batches, pad_left
from bruno_ray.residuals.extraction import last_position
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.kl_divergence import kl_of_logits

logger = logging.getLogger(__name__)

DEEPEST = 0.8
"""Share of the layers whose directions are candidates; the paper leaves out the last fifth."""

HIGHEST_KL = 0.1
LEAST_INDUCED = 0.0
UNLIKE = 0.1
"""Share of the stream points that COSMIC compares: those where the sides are least alike."""

Tokens = Sequence[int]
LayerChoice = Literal["causal", "cosmic", "both"]
"""`both`: COSMIC leaves the better half of the layers to the causal selection."""


@dataclass(frozen=True)
class LayerEffect:
    """What the direction of one layer does."""

    layer: int
    bypass: float
    """Log-odds of the behaviour on target prompts without the direction, nats; lower is better."""

    induce: float
    """Log-odds of the behaviour on baseline prompts with the direction added, nats."""

    kl: float
    """Of the next token of baseline prompts, nats; not a number where only COSMIC was asked for."""

    cosmic: float
    """Sum of two cosines, -2 to 2; higher is better."""

    @property
    def passes(self) -> bool:
        return self.kl <= HIGHEST_KL and self.induce > LEAST_INDUCED


def best_by_effect(effects: Sequence[LayerEffect]) -> LayerEffect:
    """Of those that induce the behaviour and keep the KL, the one that bypasses it best; of all, where none does."""
    passing = [effect for effect in effects if effect.passes]
    if not passing:
        logger.info(
            "no layer's direction both stays within KL %g and induces the behaviour: chosen by removal alone",
            HIGHEST_KL,
        )
    return min(passing or effects, key=lambda effect: (effect.bypass, effect.layer))


def best_by_cosmic(effects: Sequence[LayerEffect]) -> LayerEffect:
    return max(effects, key=lambda effect: (effect.cosmic, -effect.layer))


def layer_by(unedited: Evaluation, bank: DirectionBank, edit: Edit, how: LayerChoice) -> LayerEffect:
    """The layer that a selection takes; arguments and errors as of `layer_effects`."""
    if how == "causal":
        return best_by_effect(layer_effects(unedited, bank, edit))
    found = layer_effects(unedited, bank, edit, causal=False)
    if how == "cosmic":
        return best_by_cosmic(found)
    better = sorted(found, key=lambda effect: -effect.cosmic)[: math.ceil(len(found) / 2)]
    return best_by_effect(layer_effects(unedited, bank, edit, sorted(effect.layer for effect in better)))


@dataclass(frozen=True)
class _Read:
    """What forward passes under K edits gave at the last position."""

    logits_KPV: Float[Tensor, "K P V"]
    mean_KLD: Float[Tensor, "K L D"]
    """Mean over prompts."""


def layer_effects(
    unedited: Evaluation,
    bank: DirectionBank,
    edit: Edit,
    layers: Sequence[int] | None = None,
    causal: bool = True,
) -> list[LayerEffect]:
    """Of the directions of one set, layer by layer.

    Args:
        unedited: an evaluation with the single edit None; its prompts are the ones that are tried, and are better few:
            each candidate costs three forward passes over a side, or two if not ``causal``.
        edit: names the direction set, and says how a direction is taken out; its `direction_index` is replaced.
        layers: the candidates; when not given, the first four fifths of all layers.

    Raises PromptError if no answer of the unedited model shows the behaviour.
    """
    engine, prompts = unedited.engine, unedited.prompts
    n_layers = engine.loaded.architecture.n_layers
    layers = range(max(1, math.ceil(DEEPEST * n_layers))) if layers is None else layers
    target_ids, baseline_ids, belongs = _before_the_behaviour(unedited)
    edits = [Edit(edit.components, edit.direction_set, float(layer), edit.norm_mode) for layer in layers]
    resolved = engine.editor.resolve_all(edits, bank)

    target, baseline = _read(engine, target_ids, [None]), _read(engine, baseline_ids, [None])
    shift_LD = (target.mean_KLD - baseline.mean_KLD)[0]
    added_KD = torch.stack([_part_along(bank[edit.direction_set], layer, shift_LD) for layer in layers])
    without = _read(engine, target_ids, resolved)
    with_it = _read(engine, baseline_ids, [None] * len(edits), list(zip(layers, added_KD)))
    kl_K = torch.full((len(edits),), math.nan)
    if causal:
        before, after = (_read(engine, prompts.baseline_ids, each).logits_KPV for each in ([None], resolved))
        kl_K = kl_of_logits(before.expand_as(after), after).mean(-1)

    likeness_L = torch.cosine_similarity(target.mean_KLD[0], baseline.mean_KLD[0], dim=-1)
    likeness_L[0] = math.inf  # the embeddings of the last token, which is the same for all prompts
    n_points = max(1, round(UNLIKE * n_layers))
    points = likeness_L.argsort()[:n_points].sort().values
    cosmic_K = _cosine(with_it, target, points) + _cosine(without, baseline, points)
    bypass_K, induce_K = (_log_odds(read.logits_KPV, belongs).mean(-1) for read in (without, with_it))
    return [
        LayerEffect(layer, *(float(each[k]) for each in (bypass_K, induce_K, kl_K, cosmic_K)))
        for k, layer in enumerate(layers)
    ]


def _before_the_behaviour(unedited: Evaluation) -> tuple[list[Tokens], list[Tokens], Tensor]:
    """Prompts of either side with the opening of an answer up to where the behaviour begins, and its tokens."""
    prompts, end = unedited.prompts, unedited.engine.end_ids
    shown = [
        answer.token_ids
        for answer, hit in zip(unedited.whole_answers[0], unedited.marked[0])
        if hit and answer.token_ids
    ]
    proper = [answer.token_ids for answer in unedited.whole_baseline_answers[0]]
    belongs = behaviour_tokens(shown, proper) - end
    openings = []
    for tokens in shown:
        first = next((i for i, token in enumerate(tokens) if token in belongs), None)
        if first is not None:
            openings.append(tuple(tokens[:first]))
    if not openings:
        raise PromptError(
            "no answer of the unedited model shows the behaviour, so no layer can be chosen by its effect: check"
            " prompts.target and scoring.markers, or set study.layer_by to off"
        )
    sides: list[list[Tokens]] = [
        [(*ids, *openings[p % len(openings)]) for p, ids in enumerate(side)]
        for side in (prompts.target_ids, prompts.baseline_ids)
    ]
    return sides[0], sides[1], torch.tensor(sorted(belongs))


def _part_along(directions_LRD: Tensor, layer: int, shift_LD: Tensor) -> Float[Tensor, " D"]:
    """The part of the shift between the sides, after a layer, that lies along its direction."""
    rows_RD = mixture(directions_LRD, float(layer)).of([directions_LRD[layer + 1]])
    return (rows_RD @ shift_LD[layer + 1]) @ rows_RD


def _log_odds(logits_KPV: Float[Tensor, "K P V"], belongs: Tensor) -> Float[Tensor, "K P"]:
    """ln P / (1 - P) of any of the tokens."""
    logits_KPV = logits_KPV.double()
    inside = logits_KPV[..., belongs].logsumexp(-1)
    others = torch.ones(logits_KPV.shape[-1], dtype=torch.bool)
    others[belongs] = False
    return inside - logits_KPV[..., others].logsumexp(-1)


def _cosine(edited: _Read, other: _Read, points: Tensor) -> Float[Tensor, " K"]:
    """Of mean residuals, the points laid end to end."""
    return torch.cosine_similarity(edited.mean_KLD[:, points].flatten(1), other.mean_KLD[:, points].flatten(1), dim=-1)


@torch.inference_mode()
def _read(
    engine: BatchEngine,
    ids: Sequence[Tokens],
    edits: Sequence[ResolvedEdit | None],
    added: Sequence[tuple[int, Tensor]] = (),
) -> _Read:
    """Forward passes of all prompts under each edit. ``added``: per edit a layer and what is added to its output."""
    n, layers = len(edits), engine.loaded.architecture.layers
    rows = [(k, p) for p in range(len(ids)) for k in range(n)]
    logits_KPV = torch.empty(n, len(ids), engine.vocabulary_size)
    sum_KLD = torch.zeros(n, len(layers) + 1, engine.loaded.architecture.d_model, dtype=torch.float64)

    def forward(batch: list[int]) -> tuple[Tensor, Tensor]:
        of_row = [rows[row][0] for row in batch]
        padded = pad_left([ids[rows[row][1]] for row in batch], engine.tokenizer.pad_token_id or 0, engine.device)
        engine.editor.set(edits, of_row)
        try:
            with _adding(layers, [added[k] for k in of_row] if added else []), last_position(layers) as record:
                arguments = padded.input_ids, padded.attention_mask, padded.position_ids
                logits_B1V = own_forward(engine.model, *arguments, None, 1)
            return logits_B1V[:, -1].float().cpu(), record.take()
        finally:
            engine.editor.clear()

    lengths = [len(ids[p]) for _, p in rows]
    for batch, (logits_BV, residuals_BLD) in map_batches(forward, lengths, TokenBudget.for_device(engine.device)):
        for row, logits_V, residuals_LD in zip(batch, logits_BV, residuals_BLD):
            k, p = rows[row]
            logits_KPV[k, p] = logits_V
            sum_KLD[k] += residuals_LD
    return _Read(logits_KPV, (sum_KLD / len(ids)).float())


@contextmanager
def _adding(layers: Sequence[torch.nn.Module], of_row: Sequence[tuple[int, Tensor]]) -> Iterator[None]:
    """Add to the output of a layer, row by row, at all positions."""

    def hook(layer: int):
        mine = torch.tensor([float(given == layer) for given, _ in of_row])[:, None]
        vectors_BD = mine * torch.stack([vector for _, vector in of_row])

        def add(module: torch.nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + vectors_BD[:, None].to(hidden.device, hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return add

    handles = [layers[layer].register_forward_hook(hook(layer)) for layer in sorted({layer for layer, _ in of_row})]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
