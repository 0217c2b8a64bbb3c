"""A small text classifier that learns what the behaviour looks like from the unedited model's own answers.

Markers see the phrases that somebody thought of. The unedited model answers target prompts with the behaviour and
baseline prompts without it, so its own answers are a training set that costs no labels. What the prompt itself says is
left out of an answer before it is looked at; otherwise the classifier would learn what the prompts are about.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bruno_ray.errors import PromptError, first_line
from bruno_ray.scoring.markers import normalise
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

if TYPE_CHECKING:
    from bruno_ray.generation.decoding import Response
    from bruno_ray.prompts.sets import Prompt
    from bruno_ray.scoring.base import Evaluation

logger = logging.getLogger(__name__)

WORDS = re.compile(r"[a-z']+|[^\sa-z']")
LONGEST_PHRASE = 3
SHORTEST = 6
"""Letters of a proposed marker."""

RARE = 0.1
"""A proposed marker may be this much as common in baseline answers as in target answers."""

FEWEST_ANSWERS = 10
FOLDS = 5
SEED = 0


@dataclass(frozen=True)
class Phrase:
    """Words that give the behaviour away: how many target and baseline answers of the unedited model hold them."""

    text: str
    in_target: int
    in_baseline: int


class BehaviourDetector:
    """Logistic regression on phrases of up to three words (tf-idf), by scikit-learn."""

    def __init__(
        self,
        target: Sequence[tuple[str, str]],
        baseline: Sequence[tuple[str, str]],
    ) -> None:
        """
        Args:
            target, baseline: (prompt, answer of the unedited model).

        Raises:
            PromptError: fewer than ten answers on a side, or no phrase that two of them share.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_predict
        from sklearn.pipeline import make_pipeline

        require_enough(len(target), len(baseline))
        self._texts = [own_words(*pair) for pair in (*target, *baseline)]
        self._shows = np.array([True] * len(target) + [False] * len(baseline))
        vectorizer = TfidfVectorizer(
            analyzer=_phrases, min_df=2, sublinear_tf=True, norm="l2", lowercase=False, dtype=np.float64
        )
        classifier = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000, random_state=SEED)
        self._model = make_pipeline(vectorizer, classifier)
        folds = min(FOLDS, len(target), len(baseline))
        try:
            guessed = cross_val_predict(self._model, self._texts, self._shows, cv=folds)
        except ValueError as error:  # how scikit-learn says that the vocabulary is empty
            raise PromptError(
                f"the detector finds no phrases in the answers ({first_line(error)}): look at them, or leave it out of"
                " scoring.report_scorers"
            ) from error
        self.accuracy = float(np.mean([np.mean(guessed[self._shows == side] == side) for side in (True, False)]))
        """Balanced, cross-validated, of telling target answers from baseline answers; 0.5 is chance. Not every target
        answer shows the behaviour, so 1 is not to be expected."""
        self._model.fit(self._texts, self._shows)

    def probability(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Of showing the behaviour, for each (prompt, answer); float64."""
        if not pairs:
            return np.zeros(0)
        return self._model.predict_proba([own_words(*pair) for pair in pairs])[:, 1]

    def phrases(self, most: int = 20) -> list[Phrase]:
        """What tells the sides apart best, as proposals for markers: phrases that no longer one with the same counts
        contains, the weightiest first."""
        vectorizer, classifier = self._model.steps[0][1], self._model.steps[1][1]
        names = vectorizer.get_feature_names_out()
        present = vectorizer.transform(self._texts) > 0
        in_target = np.asarray(present[self._shows].sum(0)).ravel()
        in_baseline = np.asarray(present[~self._shows].sum(0)).ravel()
        share_target, share_baseline = in_target / self._shows.sum(), in_baseline / (~self._shows).sum()
        # A marker must be rare on the other side, whatever weight regularisation left it, and more than a short word.
        usable = (share_baseline <= RARE * share_target) & np.array([len(name) >= SHORTEST for name in names])
        score = classifier.coef_[0].clip(min=0) * (share_target - share_baseline) * usable
        chosen: list[Phrase] = []
        for i in np.argsort(-score, kind="stable"):
            if score[i] <= 0 or len(chosen) == most:
                break
            phrase = Phrase(names[i], int(in_target[i]), int(in_baseline[i]))
            if not any(_is_within(phrase.text, other.text) or _is_within(other.text, phrase.text) for other in chosen):
                chosen.append(phrase)
        return chosen


class Detected:
    """Share of target prompts whose answer looks to the detector like the unedited model's behaviour.

    The detector is trained on the unedited model's whole answers to the same prompts, and reads whole answers: one that
    is cut at a marker would teach how long answers with markers are. Costs one generation over the baseline prompts,
    once, and one over those target prompts whose answer stopped at a marker. With too few prompts to learn from it says
    so once and gives no metric, unless a study minimises it.
    """

    name = "detector"
    needs_unedited = False
    metrics: tuple[str, ...] = ("detected_rate",)

    def __init__(self, settings: ScoringSettings):
        self._indispensable = "detected_rate" in settings.objectives
        self.detector: BehaviourDetector | None = None

    def prepare(self, unedited: Evaluation) -> None:
        prompts = unedited.prompts
        try:
            require_enough(len(prompts.target), len(prompts.baseline))
            self.detector = BehaviourDetector(
                _pairs(prompts.target, unedited.whole_answers[0]),
                _pairs(prompts.baseline, unedited.whole_baseline_answers[0]),
            )
        except PromptError as error:
            if self._indispensable:
                raise
            self.metrics = ()
            logger.info("no behaviour rate by the detector: %s", error)

    def score(self, edited: Evaluation) -> list[Scores]:
        if self.detector is None:
            return [Scores({}) for _ in edited.edits]
        found = []
        for answers in edited.whole_answers:
            probability_P = self.detector.probability(_pairs(edited.prompts.target, answers))
            shown, total = int((probability_P > 0.5).sum()), len(probability_P)
            found.append(
                Scores(
                    {"detected_rate": shown / total},
                    {"detected_rate": (shown, total)},
                    verdicts={self.name: tuple(probability_P.tolist())},
                )
            )
        return found


def require_enough(n_target: int, n_baseline: int) -> None:
    """Raise PromptError if a detector cannot learn from so few answers."""
    for side, n in (("target", n_target), ("baseline", n_baseline)):
        if n < FEWEST_ANSWERS:
            raise PromptError(
                f"at least {FEWEST_ANSWERS} answers to {side} prompts are needed to tell the two sides apart, and there"
                f" are {n}: give more {side} train prompts, or raise prompts.n_train"
            )


def _pairs(prompts: Sequence[Prompt], answers: Sequence[Response]) -> list[tuple[str, str]]:
    return [(prompt.user, answer.text) for prompt, answer in zip(prompts, answers)]


def own_words(prompt: str, answer: str) -> str:
    """The answer's words and signs, with those of the prompt replaced by a mark that joins no phrase."""
    asked = set(WORDS.findall(normalise(prompt)))
    return " ".join("_" if word in asked and len(word) > 3 else word for word in WORDS.findall(normalise(answer)))


def _phrases(text: str) -> list[str]:
    words = text.split()
    return [
        " ".join(words[i : i + n])
        for n in range(1, LONGEST_PHRASE + 1)
        for i in range(len(words) - n + 1)
        if "_" not in words[i : i + n]
    ]


def _is_within(short: str, long: str) -> bool:
    return f" {short} " in f" {long} "
