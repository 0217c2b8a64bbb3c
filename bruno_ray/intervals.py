"""Error bars of what is measured, and whether two measurements on the same prompts differ."""

from collections.abc import Sequence

RESAMPLES = 10_000
SEED = 0


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


def mcnemar(first: Sequence[float], second: Sequence[float]) -> tuple[int, int, float]:
    """Exact test whether two rates on the same prompts differ (McNemar 1947; Fagerland, Lydersen and Laake 2013).

    Args:
        first, second: 1 for a case and 0 otherwise, prompt by prompt.

    Returns:
        Prompts that are a case only of the first, only of the second, and the two-sided p-value: how often at least as
        uneven a split of these prompts would come about if it were left to chance. 1 if there are none.
    """
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(b > a for a, b in zip(first, second))
    if only_first + only_second == 0:
        return 0, 0, 1.0
    from scipy.stats import binomtest

    return only_first, only_second, float(binomtest(only_first, only_first + only_second).pvalue)


def mean_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of first - second over prompts, and its bootstrap interval (Efron 1979, percentile method; seeded)."""
    import numpy as np

    differences = np.subtract(first, second)
    drawn = np.random.default_rng(SEED).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.quantile(differences[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(differences.mean()), float(low), float(high)
