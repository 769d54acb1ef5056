"""How sure a number from a few episodes is: 95% confidence intervals."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5% quantile


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a rate: sensible with few episodes, and at 0 or n successes.

    Raises:
        ValueError: n is not positive, or successes not in 0 to n
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes: expected 0 <= successes <= n, n >= 1")
    rate, z2 = successes / n, Z * Z
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    low, high = max(0.0, center - half), min(1.0, center + half)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)  # exact, not but for rounding


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; the same values and seed give the same interval.

    Raises:
        ValueError: there are no values
    """
    if not len(values):
        raise ValueError("no episodes: their mean has no interval")
    drawn = np.random.default_rng(seed).choice(np.asarray(values, float), (resamples, len(values)))
    low, high = np.percentile(drawn.mean(1), [2.5, 97.5])
    return float(low), float(high)
