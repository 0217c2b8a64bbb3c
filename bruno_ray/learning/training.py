"""Edits trained by gradient through the frozen model, many at once.

An edit in norm mode `none`, y' = y - s (y V^T) V, is a differentiable function of its directions V and strengths s. The
model's weights are frozen, so what training costs in memory is activations. Rows of one batch may carry different
edits (``ablation.live``), so K edits are trained in one forward and backward pass: their losses add up, and no gradient
of one touches another.

    teacher = Teacher(evaluation_of_train_prompts, settings)
    trained = Trainer(engine, teacher, bank, settings).train([plan_a, plan_b])

Dimension names: N tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.plan import TrainedEdit, TrainingPlan
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.errors import TrialError
from bruno_ray.generation.engine import BatchEngine, Work
from bruno_ray.generation.lean_forward import own_forward
from bruno_ray.learning.checkpointing import checkpointed
from bruno_ray.learning.informing import ENOUGH, GROUP, GROUPS, Group, TurningPoint, drawn_groups, turning_point
from bruno_ray.learning.interchange import mean_outputs
from bruno_ray.learning.losses import (
    answer_loss,
    entropy_loss,
    induce_loss,
    inform_loss,
    protect_loss,
    retain_loss,
    suppress_loss,
)
from bruno_ray.learning.material import Teacher, Text
from bruno_ray.learning.renewal import Renewal
from bruno_ray.learning.trainee import Trainee
from bruno_ray.model.batching import (
    TokenBudget,
    batches,
    is_out_of_memory,
    pad_left,
    release_memory,
    run_with_backoff,
)
from bruno_ray.prompts.slicing import spread
from bruno_ray.settings import LearnedSettings

logger = logging.getLogger(__name__)

FEW_TOKENS = 512
"""A batch of so many leaves a device half idle: rather than halve it, activations are recomputed."""

START_KL = 0.1
"""Nats per token on baseline prompts: strengths of a start that costs more are halved, at most HALVINGS times."""

HALVINGS = 4

T = TypeVar("T")
Row = tuple[int, str, Text, float]
"""Trainee, term, text, its share of the trainee's loss per token."""


class Trainer:
    """Trains edits of one model copy."""

    def __init__(self, engine: BatchEngine, teacher: Teacher, bank: DirectionBank, settings: LearnedSettings) -> None:
        engine.model.requires_grad_(False)
        self._engine = engine
        self._teacher = teacher
        self._bank = bank
        self._settings = settings
        self._checkpoints = settings.checkpointing == "on"
        self._budget = TokenBudget.for_device(engine.device, settings.batch_tokens)
        material = teacher.material
        self._outputs = mean_outputs(engine, material.suppress, settings.batch_tokens) if material.induce else ()
        self._renewal = Renewal(engine, teacher, bank, settings)

    def train(self, plans: Sequence[TrainingPlan]) -> list[TrainedEdit | TrialError]:
        """One result per plan, in their order; a training whose loss is not finite gives an error.

        Raises ModelError if memory does not suffice for one row.
        """
        start = time.perf_counter()
        distinct: list[TrainingPlan] = []
        for plan in plans:
            if plan.training not in distinct:
                distinct.append(plan.training)
        given = self._engine, self._bank, self._teacher.material, self._settings
        votes = [self._renewal.votes(plan) for plan in distinct]
        starts = [start for plan in distinct for start in _starts(plan)]
        plan_of = [p for p, plan in enumerate(distinct) for _ in range(1 + len(plan.rivals))]
        trainees = [Trainee(plan, *given, votes[p]) for plan, p in zip(starts, plan_of)]
        self._soften(trainees)
        ended: set[int] = set()
        optimizer = torch.optim.Adam([group for trainee in trainees for group in trainee.parameter_groups])
        wanted = [{plan.steps for plan in plans if plan.training == each} for each in distinct]
        last = max(map(max, wanted))
        found: dict[tuple[int, int], TrainedEdit | TrialError] = {}
        tokens = 0
        self._engine.work.begin("steps", last)
        for step in range(1, last + 1):
            running = [
                k
                for k, trainee in enumerate(trainees)
                if k not in ended and trainee.finite and step <= max(wanted[plan_of[k]])
            ]
            tokens += self._step(running, trainees, optimizer)
            self._engine.work.done = step
            if self._settings.renew_every and step < last and step % self._settings.renew_every == 0:
                steps, self._engine.work = self._engine.work, Work()
                finite = [k for k in running if trainees[k].finite]
                contested = {p for p, n in Counter(plan_of[k] for k in finite).items() if n > 1}
                renewal = self._renewal
                renewal.renew(
                    step, [trainees[k] for k in finite if plan_of[k] in contested or renewal.changes(trainees[k])]
                )
                self._engine.work = steps
            for p, plan in enumerate(distinct):
                rivals = [k for k in running if plan_of[k] == p and trainees[k].finite]
                if len(rivals) > 1:
                    rivals.sort(key=lambda k: trainees[k].standing())
                    ended |= set(rivals[_places(plan, step) :])
                if rivals and step in wanted[p]:
                    found[p, step] = trainees[rivals[0]].trained()
        seconds = (time.perf_counter() - start) / len(plans)
        diverged = TrialError("the loss of the training is not a number: this trial fails, the study goes on")
        account = {"few_shot": self._teacher.few_shot, "seconds": seconds, "tokens": tokens // len(plans)}
        results = [found.get((distinct.index(plan.training), plan.steps), diverged) for plan in plans]
        return [
            result if isinstance(result, TrialError) else replace(result.scaled(plan.scale), **account)
            for plan, result in zip(plans, results)
        ]

    def _soften(self, trainees: Sequence[Trainee]) -> None:
        """Halve a start's strengths until it changes answers to baseline prompts little.

        On a real model one direction at strength 1 in every layer costs a nat per token. Training undoes that first,
        and leaves the direction that it was to start from on the way.
        """
        harsh = list(trainees)
        for _ in range(HALVINGS):
            harsh = [trainee for trainee, kl in zip(harsh, self._divergences(harsh)) if not kl <= START_KL]
            if not harsh:
                break
            for trainee in harsh:
                trainee.soften()

    def _divergences(self, trainees: Sequence[Trainee]) -> list[float]:
        """KL from the unedited model by trainee, in nats per token of some of its answers to baseline prompts."""
        texts = spread(self._teacher.material.retain, self._settings.baseline_rows)
        total = sum(len(text.continuation) for text in texts)
        running = range(len(trainees))
        rows: list[Row] = [(k, "retain", text, 1 / total) for k in running for text in texts]
        lengths = _lengths(rows)
        found = [0.0] * len(trainees)

        def divergences(batch: list[int]) -> dict[tuple[int, str], float]:
            try:
                with torch.no_grad():
                    return self._loss([rows[i] for i in batch], running, trainees)[1]
            finally:
                self._engine.editor.clear()

        for terms in self._over(lengths, divergences):
            for (k, _), value in terms.items():
                found[k] += value
        return found

    def _over(self, lengths: Sequence[int], work: Callable[[list[int]], T]) -> Iterator[T]:
        """What ``work`` gives for each batch of rows of these lengths, as large as memory allows."""
        for batch in batches(lengths, self._budget):
            for _, result in run_with_backoff(work, batch, lengths, self._budget):
                yield result

    # ----- one step -----

    def _step(self, running: Sequence[int], trainees: Sequence[Trainee], optimizer: torch.optim.Optimizer) -> int:
        """One optimiser step of each running trainee; returns the tokens read."""
        rows: list[Row] = []
        for k in running:
            rows += [(k, *row) for row in trainees[k].draw()]
        rows += self._informing(running, trainees)
        parameters = [parameter for k in running for parameter in trainees[k].parameters]
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        lengths = _lengths(rows)

        def gradients(batch: list[int]) -> tuple[Sequence[Tensor | None], dict[tuple[int, str], float]]:
            layers = self._engine.loaded.architecture.layers if self._checkpoints else ()
            try:
                with checkpointed(layers):
                    loss, terms = self._loss([rows[i] for i in batch], running, trainees)
                    return torch.autograd.grad(loss, parameters, allow_unused=True), terms
            finally:
                self._engine.editor.clear()

        def fitting(batch: list[int]) -> tuple[Sequence[Tensor | None], dict[tuple[int, str], float]]:
            if self._checkpoints or self._settings.checkpointing == "off":
                return gradients(batch)
            try:
                return gradients(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(batch) * max(lengths[i] for i in batch) > FEW_TOKENS:
                    raise
            # Outside the handler: the exception's traceback would keep the failed pass's tensors alive.
            self._checkpoints = True
            release_memory()
            logger.warning(
                "memory does not suffice for training %d rows at once: activations are recomputed", len(batch)
            )
            return gradients(batch)

        for found, terms in self._over(lengths, fitting):
            for total, gradient in zip(totals, found):
                if gradient is not None:
                    total += gradient
            for (k, term), value in terms.items():
                trainees[k].note(term, value)
        for parameter, total in zip(parameters, totals):
            parameter.grad = total
        for k in running:
            trainees[k].end_step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for k in running:
            trainees[k].keep_in_bounds()
        self._engine.tokens += sum(lengths)
        return sum(lengths)

    def _informing(self, running: Sequence[int], trainees: Sequence[Trainee]) -> list[Row]:
        """Rows that tell the answers to a group of prompts apart, where these carry too little of which was asked: what
        is said up to its turning point, with the mean of what follows."""
        informed = [k for k in running if trainees[k].plan.inform]
        groups = [(k, group) for k in informed for group in drawn_groups(trainees[k], self._teacher)]
        lengths = [sum(len(text.prompt) + len(text.continuation) for text in group.texts) for _, group in groups]
        rows: list[Row] = []

        def read(batch: list[int]) -> list[tuple[int, Group, TurningPoint]]:
            chosen = [groups[g] for g in batch]
            try:
                with torch.no_grad():
                    edits = [trainees[k].resolved(self._engine) for k in informed]
                    index = [informed.index(k) for k, group in chosen for _ in group.texts]
                    logits_BNV = self._logits([text for _, group in chosen for text in group.texts], edits, index)
                    each = logits_BNV.split([len(group.texts) for _, group in chosen])
                    return [(k, group, turning_point(of_group, group)) for (k, group), of_group in zip(chosen, each)]
            finally:
                self._engine.editor.clear()

        self._engine.tokens += sum(lengths)
        for found in self._over(lengths, read):
            for k, group, point in found:
                if point.nats < ENOUGH:
                    for text, position in zip(group.texts, point.positions):
                        said = text.continuation[: position + 1]
                        row = Text(text.prompt, said, mean_V=point.log_mean_V)
                        rows.append((k, "inform", row, 1 / (GROUPS * GROUP)))
        return rows

    def _logits(
        self, texts: Sequence[Text], edits: Sequence[ResolvedEdit], index: Sequence[int]
    ) -> Float[Tensor, "B N V"]:
        """Of each text under its edit, at the tokens of the longest continuation and the one before."""
        engine = self._engine
        engine.editor.set(edits, index)
        padded = pad_left([(*text.prompt, *text.continuation) for text in texts], 0, engine.device)
        keep = max(len(text.continuation) for text in texts) + 1
        return own_forward(engine.model, padded.input_ids, padded.attention_mask, padded.position_ids, None, keep)

    def _loss(
        self, rows: Sequence[Row], running: Sequence[int], trainees: Sequence[Trainee]
    ) -> tuple[Tensor, dict[tuple[int, str], float]]:
        engine = self._engine
        edits = [trainees[k].resolved(engine) for k in running]
        index = [running.index(k) for k, *_ in rows]
        causing: dict[int, int] = {}
        for row, (k, term, _, _) in enumerate(rows):
            if term == "induce":
                if k not in causing:
                    causing[k] = len(edits)
                    edits.append(trainees[k].interchanged(edits[index[row]], self._outputs))
                index[row] = causing[k]
        logits_BNV = self._logits([text for _, _, text, _ in rows], edits, index)
        loss = torch.zeros((), device=logits_BNV.device)
        terms: dict[tuple[int, str], float] = {}
        for (k, term, text, share), logits_NV in zip(rows, logits_BNV):
            n = len(text.continuation)
            logits_NV = logits_NV[-n - 1 : -1]
            tokens_N = torch.tensor(text.continuation, device=logits_NV.device)
            match term:
                case "answers":
                    loss_N = answer_loss(logits_NV, tokens_N)
                case "suppress":
                    loss_N = suppress_loss(logits_NV, tokens_N, torch.tensor(text.weights, device=logits_NV.device))
                case "induce":
                    loss_N = induce_loss(logits_NV, tokens_N, torch.tensor(text.weights, device=logits_NV.device))
                case "entropy":
                    loss_N = entropy_loss(logits_NV)
                case "inform":
                    assert text.mean_V is not None
                    loss_N = inform_loss(logits_NV[-1:], text.mean_V.to(logits_NV.device))
                case "protect":
                    assert text.unedited_N is not None
                    loss_N = protect_loss(logits_NV, tokens_N, text.unedited_N.to(logits_NV.device))
                case _:
                    assert text.unedited_NV is not None
                    loss_N = retain_loss(logits_NV, text.unedited_NV.to(logits_NV.device))
            own = loss_N.sum() * share
            terms[k, term] = terms.get((k, term), 0.0) + float(own.detach())
            loss = loss + own * trainees[k].weight(term)
        return loss, terms


def _lengths(rows: Sequence[Row]) -> list[int]:
    """Tokens of each row."""
    return [len(text.prompt) + len(text.continuation) for _, _, text, _ in rows]


def _starts(plan: TrainingPlan) -> list[TrainingPlan]:
    """The starts that compete in one training: what is polished or the plan's own layer, then its rivals' layers."""
    return [plan, *(replace(plan, start_layer=layer, base=None) for layer in plan.rivals)]


def _places(plan: TrainingPlan, step: int) -> int:
    """How many of a plan's starts go on after ``step``: half as many each time that the steps have doubled."""
    return max(1, (1 + len(plan.rivals)) >> (step // plan.heat).bit_length())
