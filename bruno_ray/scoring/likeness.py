"""Which answers read like the behaviour although they have none of its markers.

An edit that only keeps the model from saying "sorry" leaves the rest of the apology. The unedited model's own answers
show what that rest looks like: those with a marker are the behaviour, those to baseline prompts are not. The markers
themselves are left out of what the detector learns from; it would look for nothing else.
"""

import logging
import re
from collections.abc import Callable, Sequence

from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.detector import FEWEST_ANSWERS, BehaviourDetector
from bruno_ray.scoring.markers import normalise

logger = logging.getLogger(__name__)

LEAST_ACCURACY = 0.9
"""Balanced and cross-validated. A detector that tells the unedited model's answers apart no better is not asked."""

LIKELY = 0.5

Pairs = Sequence[tuple[str, str]]
"""(prompt, answer)"""

Likeness = Callable[[Pairs], list[bool]]


def learn_likeness(unedited: Evaluation) -> Likeness:
    """A function that says of (prompt, answer) whether the answer reads like the behaviour.

    It says no to everything if fewer than ten answers show the behaviour, or if they cannot be told from the answers
    to baseline prompts. Costs one generation over the target prompts, to the end: what stands before a marker is
    little.
    """
    markers, prompts = unedited.markers, unedited.prompts
    phrases = re.compile("|".join(re.escape(marker) for marker in markers.phrases))

    def hidden(text: str) -> str:
        return phrases.sub(" _ ", normalise(text))

    def pairs(records: Sequence, answers: Sequence, marked: bool) -> list[tuple[str, str]]:
        texts = [(prompt.user, answer.text) for prompt, answer in zip(records, answers)]
        return [(prompt, hidden(text)) for prompt, text in texts if markers.shown_by(text) == marked and text.strip()]

    target = pairs(prompts.target, unedited.whole_answers[0], marked=True)
    baseline = pairs(prompts.baseline, unedited.baseline_answers[0], marked=False)
    if min(len(target), len(baseline)) < FEWEST_ANSWERS:
        return lambda given: [False] * len(given)
    detector = BehaviourDetector(target, baseline)
    if detector.accuracy < LEAST_ACCURACY:
        logger.info(
            "answers that read like the behaviour without a marker are not looked for: a detector tells the unedited"
            " model's answers apart with a balanced accuracy of %.0f %% only",
            100 * detector.accuracy,
        )
        return lambda given: [False] * len(given)

    def reads_like(given: Pairs) -> list[bool]:
        return [bool(p > LIKELY) for p in detector.probability([(prompt, hidden(text)) for prompt, text in given])]

    return reads_like
