"""A scorer from outside: how long answers to target prompts are, in tokens. Named as an objective, a study makes them
shorter.

    bruno-ray run MODEL --scoring.scorers behaviour_rate,kl_divergence,examples/plugins/answer_length.py:AnswerLength \\
        --scoring.objectives behaviour_rate,kl_divergence,answer_tokens
"""

from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings


class AnswerLength:
    name = "answer_length"
    metrics = ("answer_tokens",)
    needs_unedited = False

    def __init__(self, settings: ScoringSettings) -> None:
        pass

    def prepare(self, unedited: Evaluation) -> None:
        """Nothing is needed of the unedited model."""

    def score(self, edited: Evaluation) -> list[Scores]:
        """One entry per edit: the mean over its answers, each read to its end."""
        return [
            Scores({"answer_tokens": sum(len(answer.token_ids) for answer in answers) / len(answers)})
            for answers in edited.whole_answers
        ]
