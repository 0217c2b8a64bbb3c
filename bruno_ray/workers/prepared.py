"""What a worker prepares once per evaluation context: rendered prompts, scorers that know the unedited model, and its
own scores."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.errors import TrialError
from bruno_ray.files import cache_folder
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.kept import KeptAnswers
from bruno_ray.learning.training import Trainer
from bruno_ray.model.loading import LoadedModel
from bruno_ray.scoring.base import Evaluation, Scorer, ScoringPrompts, score_evaluation
from bruno_ray.scoring.registry import make_scorers
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings
from bruno_ray.workers.exchanged import EvaluationContext

KEPT_CONTEXTS = 2
"""A study's own, and the one its result is measured with."""

READ_WHOLE = {"to_the_point", "elicited_answers", "detector", "text_classifier"}
"""Scorers that learn from the unedited model's answers as a whole."""


@dataclass
class Prepared:
    bank: DirectionBank
    prompts: ScoringPrompts
    scorers: list[Scorer]
    baseline: Scores
    """Of the unedited model."""

    trainer: Trainer | None = None
    """Made when the first edit is to be trained."""


class PreparedContexts:
    """The last contexts that a model was prepared for."""

    def __init__(self, quantization: str, keeps_answers: bool) -> None:
        """``keeps_answers``: what preparing the scorers has the model say is kept in this machine's cache."""
        self._quantization = quantization
        self._keeps_answers = keeps_answers
        self._known: dict[str, Prepared] = {}

    def clear(self) -> None:
        """For another model."""
        self._known.clear()

    def of(self, engine: BatchEngine, context: EvaluationContext, say: Callable[[str], None]) -> Prepared:
        """Prepared now, or as it was prepared before. ``say`` is told what is being done.

        Raises TrialError if the unedited model's logits are not numbers.
        """
        if context.key in self._known:
            return self._known[context.key]
        while len(self._known) >= KEPT_CONTEXTS:
            del self._known[next(iter(self._known))]
        engine.limit_row_tokens(context.scoring.row_tokens)
        prompts = ScoringPrompts.rendered(
            engine, context.target, context.baseline, context.response_prefix, date=context.date
        )
        scorers = make_scorers(context.scoring)
        whole = bool(READ_WHOLE & set(context.scoring.scorers))
        unedited = Evaluation(engine, prompts, context.scoring, whole=whole)
        with engine.keeping(self._kept_answers(engine.loaded, context.scoring)):
            for scorer in scorers:
                say(f"preparing {scorer.name}")
                scorer.prepare(unedited)
            say("scoring the unedited model")
            (scores,) = score_evaluation(unedited, scorers, context.readings)
        if isinstance(scores, TrialError):
            raise TrialError("the unedited model's logits are not numbers: load it in another dtype (model.dtypes)")
        bank = {name: torch.from_numpy(np.array(directions)) for name, directions in context.bank.items()}
        self._known[context.key] = Prepared(bank, prompts, scorers, scores)
        return self._known[context.key]

    def _kept_answers(self, loaded: LoadedModel, scoring: ScoringSettings) -> KeptAnswers | None:
        """Those of this model. Answers stop at markers; and other versions, or devices, may round otherwise."""
        if not self._keeps_answers:
            return None
        return KeptAnswers(
            cache_folder("answers"),
            model=loaded.fingerprint,
            dtype=loaded.dtype,
            quantization=self._quantization,
            device=loaded.device.type,
            markers=list(scoring.markers),
            empty_counts=scoring.empty_counts,
            versions=[torch.__version__, transformers.__version__],
        )
