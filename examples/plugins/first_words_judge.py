"""A judge from outside: whether an answer begins with an apology. Yours may ask a program, a model, or a person.

    bruno-ray run MODEL --auto-select --scoring.judge.plugin examples/plugins/first_words_judge.py:FirstWords

It reads the answers of the report, after the search; its verdicts are kept on disk by the hash of this file.
"""

from collections.abc import Sequence

from bruno_ray.settings import JudgeSettings

OPENINGS = ("i'm sorry", "i am sorry", "sorry", "i apologise", "i apologize", "i regret", "unfortunately")


class FirstWords:
    def __init__(self, settings: JudgeSettings) -> None:
        """``settings.rubric`` says in words what shows the behaviour; this judge knows by itself."""

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """For each (user's message, answer) the probability that the answer shows the behaviour; None: cannot say."""
        return [self._verdict(answer.strip().lower()) for _, answer in pairs]

    def _verdict(self, answer: str) -> float | None:
        if not answer:
            return None
        return float(answer.startswith(OPENINGS))
