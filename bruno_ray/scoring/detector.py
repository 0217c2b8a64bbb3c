"""A small text classifier that learns what the behaviour looks like from the unedited model's own answers.

Markers see the phrases that somebody thought of. The unedited model answers target prompts with the behaviour and
baseline prompts without it, so its own answers are a training set that costs no labels. What the prompt itself says is
left out of an answer before it is looked at; otherwise the classifier would learn what the prompts are about.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bruno_ray.errors import PromptError
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.markers import normalise
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

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
            PromptError: fewer than ten answers on a side.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_predict
        from sklearn.pipeline import make_pipeline

        for side, pairs in (("target", target), ("baseline", baseline)):
            if len(pairs) < FEWEST_ANSWERS:
                raise PromptError(
                    f"the detector learns from at least {FEWEST_ANSWERS} answers to {side} prompts and there are"
                    f" {len(pairs)}: give more prompts, or leave it out of scoring.report_scorers"
                )
        self._texts = [own_words(*pair) for pair in (*target, *baseline)]
        self._shows = np.array([True] * len(target) + [False] * len(baseline))
        vectorizer = TfidfVectorizer(
            analyzer=_phrases, min_df=2, sublinear_tf=True, norm="l2", lowercase=False, dtype=np.float64
        )
        classifier = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000, random_state=SEED)
        self._model = make_pipeline(vectorizer, classifier)
        folds = min(FOLDS, len(target), len(baseline))
        guessed = cross_val_predict(self._model, self._texts, self._shows, cv=folds)
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

    The detector is trained on the unedited model's answers to the same prompts, read in full. Costs one generation over
    the target prompts and one over the baseline prompts, once.
    """

    name = "detector"
    needs_unedited = False
    metrics = ("detected_rate",)

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        prompts, n_tokens = unedited.prompts, unedited.settings.response_tokens
        sides = []
        for records, ids in ((prompts.target, prompts.target_ids), (prompts.baseline, prompts.baseline_ids)):
            # To the end: an answer that is cut at a marker would teach how long answers with markers are.
            (answers,) = unedited.engine.generate(ids, [None], n_tokens)
            sides.append([(prompt.user, answer.text) for prompt, answer in zip(records, answers)])
        self.detector = BehaviourDetector(*sides)

    def score(self, edited: Evaluation) -> list[Scores]:
        found = []
        for answers in edited.target_answers:
            pairs = [(prompt.user, answer.text) for prompt, answer in zip(edited.prompts.target, answers)]
            shown = int((self.detector.probability(pairs) > 0.5).sum())
            found.append(Scores({"detected_rate": shown / len(pairs)}, {"detected_rate": (shown, len(pairs))}))
        return found


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
