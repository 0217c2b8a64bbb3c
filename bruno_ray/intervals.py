"""Error bars of measured rates."""


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate (Wilson 1927; Brown, Cai and DasGupta 2001, section 3.1.1).

    Unlike the textbook interval it stays inside [0, 1] and has a width when nothing, or everything, was hit.

    Args:
        successes: hits, 0 <= successes <= total.
        total: trials. With 0 trials nothing is known: the interval is (0, 1).
        confidence: two-sided coverage, in (0, 1).

    Returns:
        Lower and upper bound of the rate.

    Raises:
        ValueError: if the counts or the confidence are impossible.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} trials are impossible")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    if total == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # here, because importing it takes two seconds

    interval = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
