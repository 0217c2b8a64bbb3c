"""How unlikely the edited model finds the answers that the user wants."""

from bruno_ray.errors import SettingsError
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings


class DesiredAnswers:
    """Mean negative log-likelihood per token (nats) of ``Prompt.answer``, teacher-forced under the edit.

    Over the target prompts that have an answer. A fragment or a loop cannot lower it: the tokens are given.
    """

    name = "desired_answers"
    needs_unedited = False
    metrics = ("desired_nll",)

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        prompts = unedited.prompts
        given = [(ids, prompt.answer) for ids, prompt in zip(prompts.target_ids, prompts.target) if prompt.answer]
        if not given:
            raise SettingsError(
                "the desired_answers scorer needs answers, and no target prompt has one: name their column in"
                " prompts.target.validation.answer_column, or leave the scorer out of scoring.scorers"
            )
        self._ids = [ids for ids, _ in given]
        self._answers = [
            unedited.engine.tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in given
        ]

    def score(self, edited: Evaluation) -> list[Scores]:
        answers = [self._answers] * len(edited.edits)
        logprobs = edited.engine.token_logprobs(self._ids, answers, edited.edits, edited.reads)
        return [Scores({"desired_nll": -sum(float(row.mean()) for row in rows) / len(rows)}) for rows in logprobs]
