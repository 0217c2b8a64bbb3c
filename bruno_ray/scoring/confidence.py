"""How sure the edited model is of what it says instead of the behaviour."""

import math
from collections.abc import Sequence

from torch import Tensor

from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.neighbours import Neighbours, asked_tokens, usual_bits
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings


class Confidence:
    """Mean over target prompts of the probability of the answer's least likely token, of those that prompts of its form
    are not answered with alike, times how far the answer tells its prompt from others that ask nearly the same
    (``neighbours``), beside what baseline answers tell; 0 where the behaviour is shown.

    A model that has been freed of a behaviour knows what to say; one that has only been kept from saying it guesses, or
    is sure of what would do for any prompt. Being unsure of how to begin, which all answers of a form do alike, is no
    guess: what is said then may be certain. No truth is needed: over the trials of a study this ranks edits as the
    number of right facts does (``docs/learned.md``). The metric is 1 minus that, so that less is better. Costs one
    forward pass over prompts and answers.
    """

    name = "confidence"
    needs_unedited = False
    metrics = ("doubt",)

    def __init__(self, settings: ScoringSettings):
        self._known: tuple[tuple[Prompt, ...], Neighbours] | None = None  # of the prompts that were scored last

    def prepare(self, unedited: Evaluation) -> None:
        answers = [answer.token_ids for answer in unedited.baseline_answers[0]]
        usual = usual_bits(unedited.engine.tokenizer, unedited.prompts.baseline, answers)
        self._usual = usual if 0 < usual < math.inf else 1.0

    def score(self, edited: Evaluation) -> list[Scores]:
        # [edit][prompt]: the answer, where it does not show the behaviour.
        tails = [
            [() if hit else answer.token_ids for answer, hit in zip(answers, marked)]
            for answers, marked in zip(edited.target_answers, edited.marked)
        ]
        logprobs = edited.engine.token_logprobs(edited.prompts.target_ids, tails, edited.edits, edited.reads)
        neighbours = self._neighbours(edited)
        return [
            Scores({"doubt": 1 - _confidence(rows, said, neighbours, self._usual)})
            for rows, said in zip(logprobs, tails)
        ]

    def _neighbours(self, edited: Evaluation) -> Neighbours:
        prompts = edited.prompts.target
        if self._known is None or self._known[0] is not prompts:
            self._known = prompts, Neighbours(asked_tokens(edited.engine.tokenizer, prompts))
        return self._known[1]


def _confidence(
    rows: Sequence[Tensor], answers: Sequence[Sequence[int]], neighbours: Neighbours, usual: float
) -> float:
    """``rows``: log-probabilities of each answer's tokens; an answer that does not count is empty. ``usual``: bits that
    an answer usually tells."""
    said = {p: answer for p, answer in enumerate(answers) if len(answer)}
    sure = {p: math.exp(float(rows[p][neighbours.distinguishing(p, said)].min())) for p in said}
    return sum(sure[p] * neighbours.told_apart(p, said, usual) for p in said) / len(rows)
