"""What scorers find out. It travels between processes that have no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scores:
    """The metrics of one edit."""

    values: dict[str, float]
    """Metric to value, all minimised."""

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For metrics that are rates: how many of how many."""

    rows: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Metric to its value on each prompt of a side, in their order, where that is known. What paired comparisons need;
    a study does not keep it."""

    answers: tuple[tuple[str, str], ...] = ()
    """(user's message, whole answer) of every target prompt, where other readers shall have them."""

    verdicts: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    """Reader (`markers`, `detector`, `judge`) -> for each of the answers the probability that it shows the behaviour;
    None where it has none."""

    @classmethod
    def of_rate(cls, metric: str, cases: Sequence[bool]) -> "Scores":
        """Of a metric that is the share of cases among prompts; one entry per prompt."""
        n = sum(map(bool, cases))
        return cls({metric: n / len(cases)}, {metric: (n, len(cases))}, {metric: tuple(map(float, cases))})

    @classmethod
    def merged(cls, several: "Sequence[Scores]") -> "Scores":
        """All metrics of several scorers."""
        merged = cls({})
        for scores in several:
            for name in ("values", "counts", "rows", "verdicts"):
                getattr(merged, name).update(getattr(scores, name))
        return merged


@dataclass(frozen=True)
class ComparedScores:
    """Scores with the answers that they are of, to lay beside those of others."""

    scores: Scores
    target: tuple[str, ...]
    """Whole answers, prompt by prompt."""

    baseline: tuple[str, ...]


Answer = tuple[str, bool]
"""Text of an answer, and whether it came to its end."""
