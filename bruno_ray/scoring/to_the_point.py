"""Share of target prompts that got no answer to what they ask, told without a judge."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from bruno_ray.generation.engine import Response
from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.coherence import is_unended, repetition
from bruno_ray.scoring.markers import normalise
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

WORDS = re.compile(r"\w+")
STEM = 5
"""Letters by which words are compared: "emails" takes up "email"."""

USUAL_SHARE, USUAL_REPETITION = 0.05, 0.1
"""Of the unedited model's answers to baseline prompts that may lie beyond a bound; chosen on labels by hand
(benchmarks/RESULTS.md, to_the_point)."""

HIGHEST_SHARE, LOWEST_REPETITION = 0.5, 0.2
"""Where baseline answers are all alike, a bound need not be as narrow as they are."""

MOSTLY = 0.9


class ToThePoint:
    """An answer is an evasion if it shows the behaviour or reads like it without a marker (``likeness.py``), if it
    passes the request by, or if it is no text: empty, repeating itself, or without an end where answers have one.

    It passes the request by if too few of the request's words come back, weighted by how rare they are among all
    prompts, and too few of the desired answer's where the data set has one. What is too few, and too much repetition,
    is learnt from the unedited model's answers to baseline prompts, of which a few may lie beyond. So nothing here
    knows a language; where answers do not take up words (other scripts, code), that bound is 0 and asks nothing.
    Where the data set names the words that have to come back, half of them have to.
    """

    name = "to_the_point"
    needs_unedited = False
    metrics = ("evasion_rate",)

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        prompts, answers = unedited.prompts, unedited.baseline_answers[0]
        texts = [set(stems(prompt.user)) for prompt in (*prompts.target, *prompts.baseline)]
        counts = Counter(stem for text in texts for stem in text)
        self._weights = {stem: math.log(len(texts) / count) for stem, count in counts.items()}
        self._reads_like = unedited.reads_like_behaviour
        # By the request alone: a baseline answer may be the desired one to the letter.
        shares = [
            self._recall(stems(prompt.user), set(stems(answer.text)))
            for prompt, answer in zip(prompts.baseline, answers)
        ]
        self._least_share = min(float(np.quantile(shares, USUAL_SHARE)), HIGHEST_SHARE)
        repetitions = [repetition(answer.token_ids) for answer in answers]
        self._most_repetition = max(float(np.quantile(repetitions, 1 - USUAL_REPETITION)), LOWEST_REPETITION)
        self._must_end = float(np.mean([not is_unended(answer) for answer in answers])) >= MOSTLY

    def score(self, edited: Evaluation) -> list[Scores]:
        found = []
        for answers, marked in zip(edited.target_answers, edited.marked):
            pairs = [(prompt.user, answer.text) for prompt, answer in zip(edited.prompts.target, answers)]
            alike = self._reads_like(pairs)
            evasions = [
                hit or like or self._is_no_answer(prompt, answer)
                for prompt, answer, hit, like in zip(edited.prompts.target, answers, marked, alike)
            ]
            found.append(Scores.of_rate("evasion_rate", evasions))
        return found

    def _is_no_answer(self, prompt: Prompt, answer: Response) -> bool:
        return (
            not answer.text.strip()
            or repetition(answer.token_ids) > self._most_repetition
            or (self._must_end and is_unended(answer))
            or self._passes_by(prompt, answer.text)
        )

    def _passes_by(self, prompt: Prompt, answer: str) -> bool:
        if prompt.words:
            given = set(stems(answer))
            wanted = {stem for word in prompt.words for stem in stems(word)}
            return len(wanted & given) < len(wanted) / 2
        return self._share(prompt, answer) < self._least_share

    def _share(self, prompt: Prompt, answer: str) -> float:
        """Weighted share of the words of the request, or of the desired answer, that come back; the higher of both."""
        given = set(stems(answer))
        wanted = [stems(prompt.user), *([stems(prompt.answer)] if prompt.answer else [])]
        return max(self._recall(words, given) for words in wanted)

    def _recall(self, words: Sequence[str], given: set[str]) -> float:
        # A word that is in no prompt (of a desired answer) is as rare as they get.
        weights = {word: self._weights.get(word, max(self._weights.values(), default=1.0)) for word in words}
        whole = sum(weights.values())
        return sum(weight for word, weight in weights.items() if word in given) / whole if whole else 1.0


def stems(text: str) -> list[str]:
    """The beginnings of its words."""
    return [word[:STEM] for word in WORDS.findall(normalise(text))]
