"""One edit in training: its parameters, the texts that it is trained on, and what it has come to.

Dimension names: L layers, C components, G subspaces (1 or L), r rank, d d_model.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.ablation.closed_forms import (
    DirectionBank,
    Factors,
    directions_for,
    interchanged,
    mixture,
)
from bruno_ray.ablation.edit import Edit, StrengthTable
from bruno_ray.ablation.plan import PREFIX, TrainedEdit, TrainingPlan
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.learning.agreement import Votes
from bruno_ray.learning.interchange import Outputs
from bruno_ray.learning.material import Material, Text
from bruno_ray.settings import LearnedSettings

MATERIAL = tuple(field.name for field in fields(Material) if field.name != "few_shot")
"""Terms of the loss, as a plan's weights are called, with texts that are there beforehand; the others (entropy, inform)
are on what an edit says by now. See ``losses``."""

NOISE = 0.05
"""Length of the rows that the start has no direction for."""

RISE = 1.1
"""Factor by which the weight of retain changes in a step, at most."""

MEMORY = 0.8
"""Share of the steps before in the smoothed KL divergence that decides it."""

POINTS = 10
"""Of a loss curve."""

WIDEST = 576
"""d_model up to which the learning rate holds for directions as it is given; see ``row_rate``."""

T = TypeVar("T")

STUB = Edit({}, "", None, "none")
"""What a resolved edit is of while it is trained and has no name."""


class Trainee:
    """Directions and strengths of one edit, as parameters."""

    def __init__(
        self,
        plan: TrainingPlan,
        engine: BatchEngine,
        bank: DirectionBank,
        material: Material,
        settings: LearnedSettings,
        votes: Votes,
    ) -> None:
        """``votes``: of all starts of its training."""
        architecture = engine.loaded.architecture
        self.plan = plan
        self.finite = True
        self.present: dict[int, list[Text]] = {}
        """By target prompt, what the edit says by now where that still shows the behaviour."""

        self.sure: dict[int, Text] = {}
        """By target prompt, the proper answer that the edit is sure of by now."""

        self.said: dict[int, Text] = {}
        """By target prompt, the proper answer that it gives by now, sure or not."""

        self.votes = votes
        self._material = material
        self._settings = settings
        self._components = architecture.components
        self._random = random.Random(plan.seed)
        generator = torch.Generator().manual_seed(plan.seed)
        start_Grd = _start(plan, bank, architecture.n_layers)
        missing = plan.rank - start_Grd.shape[1]
        noise = torch.randn(len(start_Grd), max(0, missing), start_Grd.shape[-1], generator=generator)
        rows = torch.cat([start_Grd[:, : plan.rank], noise * NOISE / math.sqrt(noise.shape[-1])], dim=1)
        self.rows_Grd = rows.clone().requires_grad_(True)
        strengths = torch.ones(architecture.n_layers, len(self._components))
        if plan.base is not None:
            for c, component in enumerate(self._components):
                for layer in range(architecture.n_layers):
                    strengths[layer, c] = min(plan.base.strength(component, layer), settings.max_strength)
        self._mask = torch.ones_like(strengths)
        self._mask[: plan.first_layer] = 0
        self.strengths_LC = (strengths * self._mask).requires_grad_(True)
        self._retain = plan.retain
        self._step = 0
        self._smoothed: float | None = None
        self._sums: dict[str, float] = {}
        self._curves: dict[str, list[float]] = {}

    def soften(self) -> None:
        """Half of the strengths."""
        with torch.no_grad():
            self.strengths_LC.mul_(0.5)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.rows_Grd, self.strengths_LC]

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The same for an optimiser, each with its learning rate."""
        rate = self.plan.learning_rate
        rates = row_rate(rate, self.rows_Grd.shape[-1]), rate
        return [{"params": [parameter], "lr": own} for parameter, own in zip(self.parameters, rates)]

    def draw(self) -> list[tuple[str, Text, float]]:
        """The rows of one step: (term, text, its share per token). Only the plan's seed decides which. Those of inform
        depend on what the edit says, see ``informing``."""
        settings, material = self._settings, self._material
        present = [text for texts in self.present.values() for text in texts]
        drawn = {
            "answers": self.sample([*material.answers, *material.few_shot, *self.sure.values()], settings.target_rows),
            "suppress": self.sample(present, settings.target_rows // 2),
            "retain": self.sample(material.retain, settings.baseline_rows),
        }
        drawn["suppress"] += self.sample(material.suppress, settings.target_rows - len(drawn["suppress"]))
        for term, most in (("induce", settings.target_rows), ("protect", settings.baseline_rows)):
            if getattr(self.plan, term):
                drawn[term] = self.sample(getattr(material, term), most)
        if self.plan.entropy:
            drawn["entropy"] = self.sample([self.said[p] for p in sorted(self.said)], settings.target_rows)
        rows = []
        for term, texts in drawn.items():
            if not self.weight(term):
                continue
            total = sum(sum(text.weights) if text.weights else len(text.continuation) for text in texts)
            rows += [(term, text, 1 / total) for text in texts]
        return rows

    def sample(self, texts: Sequence[T], most: int) -> list[T]:
        """As the plan's seed has it."""
        return self._random.sample(texts, min(most, len(texts)))

    def directions_Grd(self) -> Float[Tensor, "G r d"]:
        """Orthonormal rows."""
        return torch.linalg.qr(self.rows_Grd.mT)[0].mT

    def resolved(self, engine: BatchEngine) -> ResolvedEdit:
        """With factors that gradients flow through."""
        directions_Grd = self.directions_Grd()
        factors: list[Factors | None] = []
        for i, writer in enumerate(engine.loaded.architecture.writers):
            c = self._components.index(writer.component)
            if not self._mask[writer.layer, c]:
                factors.append(None)
                continue
            V_rd = directions_Grd[writer.layer if len(directions_Grd) > 1 else 0]
            factors.append(engine.editor.factors(i, V_rd, self.strengths_LC[writer.layer, c], self.plan.norm_mode))
        return ResolvedEdit(STUB, tuple(factors))

    def interchanged(self, resolved: ResolvedEdit, outputs: Outputs) -> ResolvedEdit:
        """``resolved``, with what ``outputs`` have in the subspace put in its place."""
        factors = tuple(
            factors if factors is None or output is None else interchanged(factors, output.to(factors.right.device))
            for factors, output in zip(resolved.factors, outputs)
        )
        return ResolvedEdit(STUB, factors)

    def trained_factors(self, engine: BatchEngine) -> ResolvedEdit:
        """The same to generate with."""
        with torch.no_grad():
            return self.resolved(engine)

    def standing(self) -> tuple[int, float]:
        """For comparing starts of one plan, less is better: target prompts that it still answers with the behaviour,
        less those that it answers properly and surely; then its loss over the last steps."""
        counting = {term: values for term, values in self._recent().items() if self.weight(term)}
        last = [getattr(self.plan, term) * values[-1] for term, values in counting.items()]
        return len(self.present) - len(self.sure), sum(last)

    def _recent(self) -> dict[str, list[float]]:
        """Per term, means over tenths of the steps so far."""
        return {term: _thinned(values) for term, values in self._curves.items()}

    def keep_in_bounds(self) -> None:
        """Strengths stay between 0 and their maximum, those of layers that are left out at 0."""
        with torch.no_grad():
            self.strengths_LC.clamp_(0, self._settings.max_strength).mul_(self._mask)
            self.finite = bool(torch.isfinite(self.rows_Grd).all() and torch.isfinite(self.strengths_LC).all())

    def note(self, term: str, value: float) -> None:
        self._sums[term] = self._sums.get(term, 0.0) + value

    def weight(self, term: str) -> float:
        """What a term of the loss counts by now: as planned, retain also more."""
        if term == "retain":
            return self._retain
        until = self.plan.suppress_steps
        if term == "suppress" and until is not None and self._step >= until:
            return 0.0
        return getattr(self.plan, term)

    def end_step(self) -> None:
        for term, value in self._sums.items():
            self._curves.setdefault(term, []).append(value)
        self._hold(self._sums.get("retain"))
        self._step += 1
        self._sums = {}

    def _hold(self, kl: float | None) -> None:
        """Raise the weight of retain while the KL divergence is above its bound, and let it sink to what was planned
        while it is below, each by how far off it is: a multiplier of the bound, by dual ascent on its logarithm (Boyd
        and Vandenberghe 2004, section 5). Which weight holds a bound differs by a factor of ten between models. One
        that only rises holds less than the bound, and what that costs is the behaviour, which comes back."""
        bound = self._settings.retain_kl
        if kl is None or not bound or not math.isfinite(kl):
            return
        self._smoothed = kl if self._smoothed is None else MEMORY * self._smoothed + (1 - MEMORY) * kl
        excess = max(-1.0, min(1.0, self._smoothed / bound - 1))
        self._retain = max(self.plan.retain, self._retain * RISE**excess)

    def sources(self) -> dict[str, int]:
        """How many texts it is trained on by now, by where they come from."""
        given = {term: len(getattr(self._material, term)) for term in MATERIAL if getattr(self.plan, term)}
        answers = "own answers" if self._settings.agreement == 1 else "agreed answers"
        own = {
            "own behaviour": sum(map(len, self.present.values())) if self.plan.suppress else 0,
            answers: len(self.sure) if self.plan.answers else 0,
            "few-shot answers": len(self._material.few_shot) if self.plan.answers else 0,
        }
        return {name: n for name, n in (given | own).items() if n}

    def trained(self) -> TrainedEdit:
        """What it has come to by now."""
        n_layers = len(self.strengths_LC)
        with torch.no_grad():
            directions_Grd = self.directions_Grd().float()
            if len(directions_Grd) == 1:
                directions_Grd = directions_Grd.expand(n_layers, -1, -1)
            bank_Prd = torch.cat([directions_Grd[:1], directions_Grd]).contiguous()
            strengths = self.strengths_LC.detach().double()
        array = bank_Prd.numpy()
        name = PREFIX + hashlib.sha256(array.tobytes()).hexdigest()[:12]
        tables = {
            component: StrengthTable(tuple(strengths[:, c].tolist())) for c, component in enumerate(self._components)
        }
        edit = Edit(tables, name, None, self.plan.norm_mode)
        start = None if self.plan.base is not None else self.plan.start_layer
        return TrainedEdit(edit, array, self._recent(), self.sources(), start_layer=start)


def row_rate(rate: float, d_model: int) -> float:
    """Learning rate of directions.

    Adam's first steps change each coordinate by about the rate, whatever the gradient's size: a row of length 1 moves
    by rate * sqrt(d_model). At 0.02 that is 0.5 at a width of 576 (SmolLM2), the widest it was measured at, and would
    be 1.3 at 4096, where one step leaves the direction that the training starts from. Beyond that width a step is as
    long as there (for why a rate has to fall with the width see Yang and Hu 2021, https://arxiv.org/abs/2011.14522).
    """
    return rate * min(1.0, math.sqrt(WIDEST / d_model))


def _start(plan: TrainingPlan, bank: DirectionBank, n_layers: int) -> Float[Tensor, "G r d"]:
    """The directions that training starts from: a layer's own, or those of the edit that is polished."""
    if plan.base is not None:
        directions_Lrd = directions_for(plan.base, bank).float().cpu()
        if not plan.shared:
            return directions_Lrd
        reach = [
            sum(plan.base.strength(component, layer) for component in plan.base.components) for layer in range(n_layers)
        ]
        return directions_Lrd[max(range(n_layers), key=reach.__getitem__)][None]
    directions_Prd = bank[plan.start_set].float().cpu()
    mix = mixture(directions_Prd, plan.start_layer)
    start_1rd = mix.of([directions_Prd[point] for point in mix.points])[None].float()
    return start_1rd if plan.shared else start_1rd.repeat(n_layers, 1, 1)


def _thinned(values: Sequence[float]) -> list[float]:
    size = max(1, math.ceil(len(values) / POINTS))
    chunks = [values[i : i + size] for i in range(0, len(values), size)]
    return [round(sum(chunk) / len(chunk), 6) for chunk in chunks]
