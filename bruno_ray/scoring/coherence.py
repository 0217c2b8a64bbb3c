"""Share of target answers that show no behaviour but are no answers either."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from bruno_ray.generation.engine import Response
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

NGRAM = 3


class Coherence:
    """Repetition and missing ends of the answers without markers, beyond what the unedited model does itself.

    Both are measured against the unedited model's answers to baseline prompts: where those are all cut at
    ``scoring.response_tokens``, a missing end says nothing, and a list that repeats its words is no fault. The sum
    counts relative to all target prompts, so that together with the behaviour rate it is the share of prompts that
    got no proper answer.
    """

    name = "coherence"
    needs_unedited = False
    metrics = ("incoherence",)

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        answers = unedited.baseline_answers[0]
        self._usual_repetition = float(np.quantile([repetition(answer.token_ids) for answer in answers], 0.95))
        self._usually_unended = float(np.mean([is_unended(answer) for answer in answers]))

    def score(self, edited: Evaluation) -> list[Scores]:
        return [
            Scores({"incoherence": self._incoherence(answers, marked)})
            for answers, marked in zip(edited.target_answers, edited.marked)
        ]

    def _incoherence(self, answers: Sequence[Response], marked: Sequence[bool]) -> float:
        unmarked = [answer for answer, hit in zip(answers, marked) if not hit]
        if not unmarked:
            return 0.0
        room = max(1.0 - self._usual_repetition, 1e-9)
        repeated = np.mean([max(0.0, repetition(a.token_ids) - self._usual_repetition) / room for a in unmarked])
        unended = max(0.0, float(np.mean([is_unended(answer) for answer in unmarked])) - self._usually_unended)
        return float(min(1.0, repeated + unended) * len(unmarked) / len(answers))


def repetition(token_ids: Sequence[int]) -> float:
    """Share of n-grams that occurred before in the answer, the worst of n = 1 (runs of one token) to NGRAM.

    For single tokens only immediate repeats count: words come back in any text.
    """
    worst = 0.0
    if len(token_ids) > 1:
        worst = sum(a == b for a, b in pairwise(token_ids)) / (len(token_ids) - 1)
    for n in range(2, NGRAM + 1):
        grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
        if len(grams) > 1:
            worst = max(worst, sum(count - 1 for count in Counter(grams).values()) / (len(grams) - 1))
    return worst


def is_unended(answer: Response) -> bool:
    """Cut at the limit, not by its own end or by a marker."""
    return not answer.ended and not answer.decided
