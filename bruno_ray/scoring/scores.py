"""What scorers find out. It travels between processes that have no torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scores:
    """The metrics of one edit."""

    values: dict[str, float]
    """Metric to value, all minimised."""

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For metrics that are rates: how many of how many."""

    answers: tuple[tuple[str, str], ...] = ()
    """(user's message, whole answer) of every target prompt, where other readers shall have them."""

    verdicts: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    """Reader (`markers`, `detector`, `judge`) -> for each of the answers the probability that it shows the behaviour;
    None where it has none."""
