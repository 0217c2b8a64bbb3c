"""Scores together with the answers that they are of: of edits of a model, and of answers that a server gave."""

from collections.abc import Sequence

from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.errors import TrialError
from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.prompt_reads import PromptReads
from bruno_ray.scoring.base import Evaluation, Scorer, ScoringPrompts, score_evaluation
from bruno_ray.scoring.scores import Answer, ComparedScores
from bruno_ray.settings import ScoringSettings

TEXT_SCORERS = ("behaviour_rate", "to_the_point", "baseline_behaviour")
"""Scorers that look at nothing but the answers' texts."""

LOGIT_SCORERS = ("kl_divergence", "neutral_text")
"""Scorers that compare logits token by token: another tokenizer has other tokens."""


class GivenEvaluation(Evaluation):
    """Of one list of answers a side, for scorers in TEXT_SCORERS. Their tokens are those of the engine's tokenizer."""

    def __init__(
        self,
        engine: BatchEngine,
        prompts: ScoringPrompts,
        settings: ScoringSettings,
        target: Sequence[Answer],
        baseline: Sequence[Answer],
    ):
        super().__init__(engine, prompts, settings)
        self._target, self._baseline = self._responses(target), self._responses(baseline)

    def _responses(self, answers: Sequence[Answer]) -> list[Response]:
        encode = self.engine.tokenizer.encode
        return [
            Response(tuple(encode(text, add_special_tokens=False)), text, ended=ended, decided=False)
            for text, ended in answers
        ]

    def answers_to(
        self,
        ids: Sequence[Sequence[int]],
        edits: Sequence[ResolvedEdit | None] | None = None,
        reads: PromptReads | None = None,
    ) -> list[list[Response]]:
        return [self._target if ids is self.prompts.target_ids else self._baseline]


def score_edits_side_by_side(
    engine: BatchEngine,
    scorers: Sequence[Scorer],
    prompts: ScoringPrompts,
    settings: ScoringSettings,
    edits: Sequence[ResolvedEdit | None],
) -> list[ComparedScores]:
    """All edits in one evaluation. Raises TrialError if the logits of one are not numbers."""
    return _with_answers(Evaluation(engine, prompts, settings, edits), scorers)


def score_given_answers(
    engine: BatchEngine,
    scorers: Sequence[Scorer],
    prompts: ScoringPrompts,
    settings: ScoringSettings,
    target: Sequence[Answer],
    baseline: Sequence[Answer],
) -> ComparedScores:
    """What can be said of texts alone, by the scorers that need no more."""
    evaluation = GivenEvaluation(engine, prompts, settings, target, baseline)
    (found,) = _with_answers(evaluation, [scorer for scorer in scorers if scorer.name in TEXT_SCORERS])
    return found


def _with_answers(evaluation: Evaluation, scorers: Sequence[Scorer]) -> list[ComparedScores]:
    found = []
    for k, scores in enumerate(score_evaluation(evaluation, scorers)):
        if isinstance(scores, TrialError):
            raise scores
        sides = (evaluation.whole_answers[k], evaluation.whole_baseline_answers[k])
        target, baseline = (tuple(answer.text for answer in answers) for answers in sides)
        found.append(ComparedScores(scores, target, baseline))
    return found
