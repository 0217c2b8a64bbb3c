"""Error bars of measured rates. Plain Python, no dependencies."""

from __future__ import annotations

import math
from statistics import NormalDist


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
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / total
    denominator = 1 + z**2 / total
    centre = (rate + z**2 / (2 * total)) / denominator
    margin = z / denominator * math.sqrt(rate * (1 - rate) / total + z**2 / (4 * total**2))
    # The bounds are exactly 0 and 1 at the ends; rounding must not move them past the rate.
    lower = 0.0 if successes == 0 else centre - margin
    upper = 1.0 if successes == total else centre + margin
    return lower, upper
