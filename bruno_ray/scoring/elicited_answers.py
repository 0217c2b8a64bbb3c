"""Whether the edited model says what the unedited one can be made to say."""

import logging
import math
from collections import Counter

from bruno_ray.generation.engine import Response
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.elicitation import Elicitation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

logger = logging.getLogger(__name__)

TRIALS = 2.0
"""What looking for references may cost, in trials of the unedited model."""


class ElicitedAnswers:
    """How much the edited model's answers miss of what the unedited model knows and does not say.

    For each target prompt the unedited model is made to give a reference: its likeliest unmarked answer (see
    ``elicitation``). That costs as many tokens as two trials, however many prompts there are.

    The metric is 1 - recall of the reference's tokens in the edited model's answer, weighted by how few references
    they occur in (inverse document frequency: names and values count, the words that all answers share do not);
    1 for marked answers. The fluent rest of a refusal, a fragment or a loop recalls nothing. A prompt without a
    reference counts as in the behaviour rate.

    Recall is what is expected: it is multiplied by the probability that the edited model does *not* fall back on what
    the unedited one says, up to its marker. Greedy answers alone cannot tell an edit that has just tipped every
    validation prompt, and fails on the next one, from an edit with room to spare. This costs one forward pass over
    the prompts whose answers are unmarked.
    """

    name = "elicited_answers"
    needs_unedited = False
    metrics = ("elicited_mismatch",)

    def __init__(self, settings: ScoringSettings):
        pass

    def elicit(self, unedited: Evaluation) -> dict[int, tuple[int, ...]]:
        """References by the index of their target prompt."""
        return Elicitation(unedited, TRIALS).likeliest()

    def prepare(self, unedited: Evaluation) -> None:
        end_ids = unedited.engine.end_ids
        self._references = {
            p: Counter(token for token in answer if token not in end_ids) for p, answer in self.elicit(unedited).items()
        }
        n_prompts, n = len(unedited.prompts.target_ids), len(self._references)
        logger.info("elicited unmarked answers to %d of %d target prompts", n, n_prompts)
        if 2 * n < n_prompts:
            logger.warning(
                "elicited_answers has references for only %d of %d target prompts, the others count as in the behaviour"
                " rate: set scoring.compliant_opening to how an answer without the behaviour begins",
                *(n, n_prompts),
            )
        (answers,), (marked,) = unedited.target_answers, unedited.marked
        self._ids = unedited.prompts.target_ids
        self._behaviour = [answer.token_ids if hit else () for answer, hit in zip(answers, marked)]
        occurrences = Counter(token for reference in self._references.values() for token in reference)
        self._weights = {token: math.log((n + 1) / (count + 0.5)) for token, count in occurrences.items()}

    def score(self, edited: Evaluation) -> list[Scores]:
        # [edit][prompt]: the unedited model's marked answer, where the edited model's is unmarked.
        behaviour = [[() if hit else own for own, hit in zip(self._behaviour, marked)] for marked in edited.marked]
        relapses = edited.engine.token_logprobs(self._ids, behaviour, edited.edits, edited.reads)
        found = []
        for answers, marked, logprobs in zip(edited.target_answers, edited.marked, relapses):
            total = 0.0
            for p, (answer, hit, logprobs_N) in enumerate(zip(answers, marked, logprobs)):
                relapse = math.exp(float(logprobs_N.sum())) if len(logprobs_N) else 0.0
                total += 1.0 if hit else 1 - (1 - relapse) * self._recall(p, answer)
            found.append(Scores({"elicited_mismatch": total / len(answers)}))
        return found

    def _recall(self, p: int, answer: Response) -> float:
        """Weighted share of the reference's tokens that an unmarked answer has; 1 without a reference."""
        if p not in self._references:
            return 1.0
        reference, given = self._references[p], Counter(answer.token_ids)
        whole = sum(self._weights[token] * count for token, count in reference.items())
        return sum(self._weights[token] * min(count, given[token]) for token, count in reference.items()) / whole
