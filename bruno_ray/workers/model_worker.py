"""The owner of one model copy. It holds state and forwards; the arithmetic is elsewhere.

``ModelWorker`` is a plain class: tests build it directly, the pool wraps it in an actor. Its methods take and return
small picklable values, never live tensors on a device.
"""

import datetime
import gc
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Protocol

import numpy as np
import psutil
import torch
from transformers import PreTrainedConfig

from bruno_ray.ablation.changes import changed_shares
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.places import further_places
from bruno_ray.ablation.plan import TrainedEdit, TrainingPlan
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.errors import TrialError
from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.parts import Routing, head_effects, head_projections, routing
from bruno_ray.learning.few_shot import few_shot_answers
from bruno_ray.learning.gradients import require_gradient
from bruno_ray.learning.layer_effects import LayerChoice, layer_by
from bruno_ray.learning.material import Teacher
from bruno_ray.learning.training import Trainer
from bruno_ray.model.batching import TokenBudget
from bruno_ray.model.classes import hub_task
from bruno_ray.model.coverage import coverage
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.progress import duration
from bruno_ray.prompts.dates import prints_date
from bruno_ray.prompts.rendering import render, render_texts
from bruno_ray.prompts.response_prefix import settle_response_prefix
from bruno_ray.prompts.sets import Prompt
from bruno_ray.residuals.extraction import extract_residuals
from bruno_ray.scoring.base import Evaluation, Scorer, ScoringPrompts, score_edits
from bruno_ray.scoring.kl_divergence import KLDivergence
from bruno_ray.scoring.openings import compliant_opening
from bruno_ray.scoring.racing import race
from bruno_ray.scoring.registry import SCORERS
from bruno_ray.scoring.scores import Answer, ComparedScores, Scores
from bruno_ray.scoring.side_by_side import LOGIT_SCORERS, score_edits_side_by_side, score_given_answers
from bruno_ray.settings import LearnedSettings, ModelSettings, ResidualSettings, ScoringSettings
from bruno_ray.workers.exchanged import ComparedEdits, EvaluationContext, ModelInfo, TrainingPrompts, TrialOutcome
from bruno_ray.workers.prepared import Prepared, PreparedContexts

logger = logging.getLogger(__name__)

SAMPLES = 4
"""Answers per trial that travel with its scores."""

FIRST_TOKENS = 16
"""Prompts whose answers' first tokens are compared before the answers of all are."""


class Folders(Protocol):
    """`shipping.Folders`, without importing Ray."""

    def local(self, name: str) -> str: ...


class ModelWorker:
    """Loads a model once and answers for it."""

    def __init__(
        self, model: ModelSettings, threads: int = 1, folders: Folders | None = None, keeps_answers: bool = False
    ):
        """Raises ModelError when the model cannot be loaded.

        Args:
            folders: brings models from the driver's machine.
            keeps_answers: what preparing the scorers has the unedited model say is kept in this machine's cache.
        """
        torch.set_num_threads(max(1, threads))
        self._folders = folders
        self.loaded = load_model(self._here(model))
        self.engine = BatchEngine(self.loaded)
        self._doing = ""
        self._contexts = PreparedContexts(model.quantization, keeps_answers)
        self._residual_budgets: dict[int, TokenBudget] = {}

    def _here(self, model: ModelSettings) -> ModelSettings:
        return model if self._folders is None else model.model_copy(update={"id": self._folders.local(model.id)})

    def progress(self) -> str:
        """What this worker is at; asked from another thread while a call runs."""
        engine = getattr(self, "engine", None)  # there is none while another model is loaded in its place
        if engine is None or not engine.work.total:
            return self._doing
        work = engine.work
        return f"{self._doing}, {work.done}/{work.total} {work.what}, to go {duration(work.remaining())}".lstrip(", ")

    def to_go(self) -> float | None:
        """Seconds until what it is at is done, asked likewise; None where nothing can be said."""
        engine = getattr(self, "engine", None)
        return engine.work.remaining() if engine is not None and engine.work.total else None

    def describe(self) -> ModelInfo:
        architecture = self.loaded.architecture
        return ModelInfo(
            n_layers=architecture.n_layers,
            d_model=architecture.d_model,
            family=architecture.family,
            components=architecture.components,
            fingerprint=self.loaded.fingerprint,
            dtype=self.loaded.dtype,
            coverage=tuple(coverage(self.loaded.model, architecture)),
            n_parameters=sum(parameter.numel() for parameter in self.loaded.model.parameters()),
            device=str(self.loaded.device),
            task=hub_task(self.loaded.model.config),
            prints_date=prints_date(self.loaded.tokenizer),
            further=further_places(architecture),
        )

    def response_prefix(self, prompts: Sequence[Prompt], date: datetime.date, max_new_tokens: int = 60) -> str:
        """What every answer of the unedited model begins with, a reasoning block closed. See ``response_prefix.py``."""

        def answers(prefix: str) -> list[str]:
            ids = render(self.loaded.tokenizer, prompts, prefix, date=date)
            some = ids[:: max(1, len(ids) // FIRST_TOKENS)]

            def texts(n_tokens: int, ids: list[list[int]]) -> list[str]:
                (responses,) = self.engine.generate(ids, [None], n_tokens)
                return [
                    self.loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=False) for answer in responses
                ]

            # Answers whose first tokens begin with different letters have nothing in common, and most models' do.
            first = texts(1, some)
            return texts(max_new_tokens, ids) if len({text[:1] for text in first}) == 1 else first

        return settle_response_prefix(answers, render_texts(self.loaded.tokenizer, prompts[:1], date=date)[0])

    def rendered(self, prompts: Sequence[Prompt], response_prefix: str, date: datetime.date) -> list[str]:
        """The prompts as the model reads them: chat template, header of the answer, response prefix."""
        return render_texts(self.loaded.tokenizer, prompts, response_prefix, date=date)

    def opening(
        self, baseline: Sequence[Prompt], response_prefix: str, date: datetime.date, scoring: ScoringSettings
    ) -> tuple[tuple[int, ...], str]:
        """How the unedited model's answers without the behaviour begin, as tokens and as text; empty if it has none."""
        self._doing = "looking for how baseline answers begin"
        prompts = ScoringPrompts.rendered(self.engine, (), baseline, response_prefix, date=date)
        tokens = compliant_opening(Evaluation(self.engine, prompts, scoring))
        return tokens, self.engine.texts([tokens])[0]

    def residuals(
        self,
        prompts: Sequence[Prompt],
        response_prefix: str,
        date: datetime.date,
        settings: ResidualSettings,
        opening: Sequence[int] = (),
    ) -> np.ndarray:
        """(N, 1 + answer_tokens, n_layers + 1, d_model) float32; ``opening`` as of ``extract_residuals``."""
        self._doing = f"residuals of {len(prompts)} prompts"
        ids = render(self.loaded.tokenizer, prompts, response_prefix, settings.max_tokens, date=date)
        # One budget for all shards: what the first has found out about memory serves the others.
        budget = self._residual_budgets.setdefault(
            settings.batch_tokens, TokenBudget.for_device(self.loaded.device, settings.batch_tokens)
        )
        return extract_residuals(self.loaded, ids, settings.answer_tokens, budget, opening=opening).numpy()

    def routing(
        self,
        prompts: Sequence[Prompt],
        response_prefix: str,
        date: datetime.date,
        edit: Edit | None = None,
        bank: Mapping[str, np.ndarray] | None = None,
    ) -> Routing:
        """Where a mixture of experts sends the prompts' tokens. See ``generation/parts.py``."""
        self._doing = f"routing of {len(prompts)} prompts"
        ids = render(self.loaded.tokenizer, prompts, response_prefix, date=date)
        resolved = None
        if edit is not None:
            tensors = {name: torch.from_numpy(np.array(directions)) for name, directions in (bank or {}).items()}
            resolved = self.engine.editor.resolve(edit, tensors)
        return routing(self.engine, ids, resolved)

    def head_scores(
        self,
        how: str,
        target: Sequence[Prompt],
        baseline: Sequence[Prompt],
        response_prefix: str,
        date: datetime.date,
        directions: np.ndarray,
    ) -> list[list[float] | None]:
        """By layer and head what `search.heads` chooses by: "causal" or "projection". See ``generation/parts.py``."""
        self._doing = f"attention heads by {how}"
        sides = [render(self.loaded.tokenizer, prompts, response_prefix, date=date) for prompts in (target, baseline)]
        rows = torch.from_numpy(np.array(directions))
        if how == "causal":
            return head_effects(self.engine, sides[0], {"": rows}, "")
        return head_projections(self.engine, *sides, rows)

    def prepared(self, context: EvaluationContext) -> Prepared:
        """Everything that is done once per context. Raises as `PreparedContexts.of`."""
        return self._contexts.of(self.engine, context, self._say)

    def _say(self, doing: str) -> None:
        self._doing = doing

    def baseline(self, context: EvaluationContext) -> Scores:
        """The unedited model's own scores. Raises TrialError if they are not numbers."""
        return self.prepared(context).baseline

    def evaluate(
        self,
        context: EvaluationContext,
        edits: Sequence[Edit | TrainingPlan],
        rivals: Sequence[tuple[float, float]] = (),
    ) -> list[TrialOutcome]:
        """Score all edits in one batch, those first trained that are only plans.

        With ``rivals`` (see ``scoring/racing.py``), edits that one of them dominates are left half-way; those that
        were trained here are not, since the training has cost more. An edit that breaks the model has an error and
        leaves the others alone.
        """
        prepared = self.prepared(context)
        start, tokens = time.perf_counter(), self.engine.tokens
        trained, found = self._train(context, prepared, edits)
        bank = prepared.bank | {each.edit.direction_set: torch.from_numpy(each.directions) for each in trained.values()}
        self._doing = f"scoring {len(edits)} trial{'s' if len(edits) > 1 else ''}"
        known = {k: edit for k, edit in enumerate(edits) if isinstance(edit, Edit)}
        known |= {k: each.edit for k, each in trained.items()}
        resolved = dict(zip(known, self.engine.editor.resolve_all(list(known.values()), bank)))
        sound = [k for k, edit in resolved.items() if _is_finite(edit)]
        samples: dict[int, tuple[tuple[str, str], ...]] = {}
        pruned: set[int] = set()
        if sound and rivals:
            spared = [i for i, k in enumerate(sound) if k in trained]
            measured = race(
                self.engine,
                prepared.scorers,
                prepared.prompts,
                context.scoring,
                [resolved[k] for k in sound],
                rivals,
                spared,
            )
            found |= {sound[i]: scores for i, scores in measured.scores(prepared.scorers, context.readings).items()}
            found |= {sound[i]: scores for i, scores in measured.pruned.items()}
            pruned = {sound[i] for i in measured.pruned}
            samples = {sound[i]: _samples(measured.evaluation, j) for j, i in enumerate(measured.finished)}
        elif sound:
            evaluation, results = score_edits(
                self.engine,
                prepared.scorers,
                prepared.prompts,
                context.scoring,
                [resolved[k] for k in sound],
                context.readings,
            )
            found |= dict(zip(sound, results))
            samples = {k: _samples(evaluation, i) for i, k in enumerate(sound)}
        seconds = (time.perf_counter() - start) / len(edits)
        tokens = (self.engine.tokens - tokens) // len(edits)
        outcomes = []
        for k in range(len(edits)):
            result = found.get(
                k, TrialError("the edit's directions are not numbers: this trial fails, the study goes on")
            )
            failed = isinstance(result, TrialError)
            outcomes.append(
                TrialOutcome(
                    scores=None if failed else result,
                    error=str(result) if failed else None,
                    seconds=seconds,
                    tokens=tokens,
                    samples=samples.get(k, ()),
                    pruned=k in pruned,
                    trained=None if failed else trained.get(k),
                )
            )
        return outcomes

    def _train(
        self, context: EvaluationContext, prepared: Prepared, edits: Sequence[Edit | TrainingPlan]
    ) -> tuple[dict[int, TrainedEdit], dict[int, Scores | TrialError]]:
        """What became of the plans among ``edits``, by index: edits, or errors."""
        plans = {k: plan for k, plan in enumerate(edits) if isinstance(plan, TrainingPlan)}
        if not plans:
            return {}, {}
        if context.training is None:
            raise ValueError("a plan to train an edit came without prompts to train it on")
        if prepared.trainer is None:
            self._doing = "preparing the training"
            prepared.trainer = self._trainer(context, context.training, prepared.bank)
        self._doing = f"training {len(plans)} trial{'s' if len(plans) > 1 else ''}"
        results = dict(zip(plans, prepared.trainer.train(list(plans.values()))))
        trained = {k: result for k, result in results.items() if isinstance(result, TrainedEdit)}
        return trained, {k: result for k, result in results.items() if isinstance(result, TrialError)}

    def _trainer(self, context: EvaluationContext, training: TrainingPrompts, bank: dict[str, torch.Tensor]) -> Trainer:
        prompts = ScoringPrompts.rendered(
            self.engine, training.target, training.baseline, context.response_prefix, date=context.date
        )
        unedited = Evaluation(self.engine, prompts, context.scoring, whole=True)
        protected = render(self.engine.tokenizer, training.protected, context.response_prefix, date=context.date)
        few_shot = self._few_shot(context, training)
        teacher = Teacher(unedited, training.settings, protected, few_shot)
        return Trainer(self.engine, teacher, bank, training.settings)

    def _few_shot(self, context: EvaluationContext, training: TrainingPrompts) -> dict[int, Response]:
        """Further desired answers, where there are some but few."""
        given = sum(bool(prompt.answer) for prompt in training.target)
        if not 0 < given < training.settings.few_shot:
            return {}
        n_tokens = context.scoring.response_tokens
        return few_shot_answers(self.engine, training.target, context.response_prefix, n_tokens, date=context.date)

    def few_shot_answers(
        self, prompts: Sequence[Prompt], response_prefix: str, date: datetime.date, max_new_tokens: int
    ) -> dict[int, str]:
        """By index, what the unedited model is sure of as the answer to a prompt without a desired one, surest first.
        See ``learning/few_shot.py``."""
        found = few_shot_answers(self.engine, prompts, response_prefix, max_new_tokens, date=date)
        return {p: answer.text for p, answer in found.items()}

    def require_gradient(
        self, prompts: Sequence[Prompt], date: datetime.date, learned: LearnedSettings, response_tokens: int
    ) -> None:
        """Raise ModelError if nothing can be trained on this model. See ``learning/gradients.py``."""
        ids = render(self.loaded.tokenizer, prompts[:1], date=date)[0]
        require_gradient(self.engine, ids, response_tokens, learned)

    def layer_by(
        self,
        context: EvaluationContext,
        target: Sequence[Prompt],
        baseline: Sequence[Prompt],
        edit: Edit,
        how: LayerChoice,
    ) -> dict[str, float]:
        """The layer whose direction of the edit's set does most on these prompts, and what it does.

        Raises PromptError if no answer shows the behaviour.
        """
        self._doing = "trying the layers' directions"
        prompts = ScoringPrompts.rendered(self.engine, target, baseline, context.response_prefix, date=context.date)
        unedited = Evaluation(self.engine, prompts, context.scoring, whole=True)
        return asdict(layer_by(unedited, self.prepared(context).bank, edit, how))

    def changed(self, context: EvaluationContext, edits: Sequence[Edit]) -> list[dict[str, float]]:
        """Per edit: component -> relative Frobenius norm of what it changes. Raises ModelError for a weight that cannot
        be read."""
        bank = self.prepared(context).bank
        self._doing = "measuring what edits change"
        return changed_shares(self.loaded.architecture, self.engine.editor.resolve_all(list(edits), bank))

    def measure_other(self, context: EvaluationContext, model: ModelSettings) -> Scores:
        """Scores of another model against this worker's own, which is dropped for it: only one is in memory at a time.

        Afterwards this worker is of no further use. Scorers that ask the unedited model about the edited one's
        answers are left out. Raises ModelError, or TrialError if the other model's scores are not numbers.
        """
        prepared = self.prepared(context)
        scorers = [scorer for scorer in prepared.scorers if not scorer.needs_unedited]
        self._load_instead(model, context.scoring)
        _, (scores,) = score_edits(self.engine, scorers, prepared.prompts, context.scoring, [None], context.readings)
        if isinstance(scores, TrialError):
            raise scores
        return scores

    def _load_instead(self, model: ModelSettings, scoring: ScoringSettings) -> None:
        self._contexts.clear()
        self._doing = f"loading {model.id}"
        self.engine.editor.close()
        del self.engine, self.loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.loaded = load_model(self._here(model))
        self.engine = BatchEngine(self.loaded)
        self.engine.limit_row_tokens(scoring.row_tokens)
        self._doing = f"scoring {model.id}"

    def compare(
        self,
        context: EvaluationContext,
        edits: Sequence[Edit | None],
        others: Sequence[ComparedEdits],
        given: Sequence[tuple[Sequence[Answer], Sequence[Answer]]],
    ) -> tuple[list[ComparedScores], list[list[ComparedScores]], list[ComparedScores]]:
        """Scores and answers of edits of this worker's model (None: as it is), of other models with edits of their own,
        and of (target, baseline) answers that a server gave.

        KL divergences are from the first of ``edits``; a model with another tokenizer has none, and reads the prompts
        through its own chat template. Afterwards this worker is of no further use if there were others. Raises as
        `measure_other`.
        """
        prepared = self.prepared(context)
        scorers: list[Scorer] = [scorer for scorer in prepared.scorers if not scorer.needs_unedited]
        settings, prompts = context.scoring, prepared.prompts
        resolved = iter(self.engine.editor.resolve_all([edit for edit in edits if edit is not None], prepared.bank))
        mine = [None if edit is None else next(resolved) for edit in edits]
        if mine[0] is not None:
            self._doing = "preparing the comparison with the first"
            reference = Evaluation(self.engine, prompts, settings, [mine[0]])
            kl = SCORERS[KLDivergence.name](settings)
            kl.prepare(reference)
            scorers = [kl if scorer.name == kl.name else scorer for scorer in scorers]
        self._doing = f"scoring {len(mine)} edit{'s' if len(mine) > 1 else ''}"
        own = score_edits_side_by_side(self.engine, scorers, prompts, settings, mine)
        texts = [score_given_answers(self.engine, scorers, prompts, settings, *sides) for sides in given]
        width = logit_width(self.loaded)
        found = []
        for other in others:
            self._load_instead(other.model, settings)
            theirs, their_scorers = prompts, scorers
            alike = ScoringPrompts.rendered(
                self.engine, context.target, context.baseline, context.response_prefix, date=context.date
            )
            if alike != prompts or logit_width(self.loaded) != width:
                their_scorers = [scorer for scorer in scorers if scorer.name not in LOGIT_SCORERS]
                prefix = self.response_prefix([*context.target, *context.baseline], context.date)
                theirs = ScoringPrompts.rendered(
                    self.engine, context.target, context.baseline, prefix, date=context.date
                )
            bank = {name: torch.from_numpy(directions) for name, directions in other.bank.items()}
            resolved = iter(self.engine.editor.resolve_all([edit for edit in other.edits if edit is not None], bank))
            ours = [None if edit is None else next(resolved) for edit in other.edits]
            found.append(score_edits_side_by_side(self.engine, their_scorers, theirs, settings, ours))
        return own, found, texts

    def answers(
        self,
        context: EvaluationContext,
        prompts: Sequence[Prompt],
        edits: Sequence[Edit | None],
        max_new_tokens: int,
    ) -> list[list[str]]:
        """Whole greedy answers, [edit][prompt]. Of the context only bank, response prefix and date are used."""
        bank = self.prepared(context).bank
        self._doing = "sample answers"
        resolved = self.engine.editor.resolve_all([edit for edit in edits if edit is not None], bank)
        given = iter(resolved)
        ids = render(self.loaded.tokenizer, prompts, context.response_prefix, date=context.date)
        rows = self.engine.generate(ids, [None if edit is None else next(given) for edit in edits], max_new_tokens)
        return [[response.text for response in responses] for responses in rows]

    def own_answers(
        self, prompts: Sequence[Prompt], response_prefix: str, date: datetime.date, max_new_tokens: int
    ) -> list[Answer]:
        """Greedy answers of the unedited model, and whether each came to its end."""
        ids = render(self.loaded.tokenizer, prompts, response_prefix, date=date)
        (responses,) = self.engine.generate(ids, [None], max_new_tokens)
        return [(response.text, response.ended) for response in responses]

    def first_tokens(self, prompts: Sequence[Prompt], date: datetime.date, most: int) -> list[list[tuple[str, float]]]:
        """For each prompt the likeliest first tokens of the unedited model's answer: text, log-probability in nats."""
        (logits_PV,) = self.engine.next_logits(render(self.loaded.tokenizer, prompts, date=date), [None])
        likeliest = logits_PV.log_softmax(-1).topk(min(most, logits_PV.shape[-1]))
        return [
            list(zip(self.engine.texts([(token,) for token in tokens]), logprobs))
            for tokens, logprobs in zip(likeliest.indices.tolist(), likeliest.values.tolist())
        ]

    def memory(self) -> dict[str, int]:
        """Bytes: resident memory of this process, and what torch holds on GPUs."""
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        return {
            "memory": psutil.Process().memory_info().rss,
            "gpu_memory": sum(torch.cuda.memory_reserved(gpu) for gpu in gpus),
        }


def logit_width(loaded: LoadedModel) -> int:
    """Tokens that the model has logits for, which may be more than its tokenizer knows."""
    config: PreTrainedConfig = loaded.model.config  # ty: ignore[invalid-assignment] - torch calls any attribute a module
    return int(config.get_text_config().vocab_size)


def _is_finite(edit: ResolvedEdit) -> bool:
    used = (factors for factors in edit.factors if factors)
    tensors = (t for factors in used for t in (factors.left, factors.right, factors.scale, factors.offset))
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)


def _samples(evaluation: Evaluation, k: int) -> tuple[tuple[str, str], ...]:
    """Only if a scorer has asked for answers: they are not made for show."""
    if not evaluation.has_answers:
        return ()
    pairs = zip(evaluation.prompts.target[:SAMPLES], evaluation.target_answers[k])
    return tuple((prompt.user, answer.text) for prompt, answer in pairs)
