"""Is the challenger better than the champion? What two lists of episodes from the same starts say.

Where either ever clears the level, clears count, by McNemar's exact test: a start tells something only if one cleared
it and the other did not, and of such starts the challenger must have won more than a fair coin would. It fits what is
counted (yes or no, in pairs) and holds for few clears too, where a bootstrap of a rate near 0 or 1 does not.

Where neither ever clears, the return counts, by the bootstrap of its mean difference over the pairs: returns have two
or three heaps (the first pit, the first pipe) and no normal distribution, which a bootstrap does not ask for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.params import PromoteParams

RESAMPLES = 10_000


def judge(
    challenger: Sequence[dict[str, Any]], champion: Sequence[dict[str, Any]] | None, rule: PromoteParams
) -> dict[str, Any]:
    """PASS or FAIL, with the reasons in words and the test in numbers.

    Args:
        challenger: episodes with "clear" and "return", one a start
        champion: from the same starts in the same order; None: there is no champion, the floors alone decide

    Returns:
        status, reasons, and test (None without a champion)
    """
    test = None if champion is None else compare(challenger, champion, rule.confidence)
    reasons = broken_floors(challenger, rule)
    passed = not reasons
    if test is None:
        reasons.append("there is no champion to compare with, so only the floors and the artifact's hash were checked")
    else:
        passed = passed and test["better"]
        reasons.append(test["words"])
    return {"status": "PASS" if passed else "FAIL", "reasons": reasons, "test": test}


def broken_floors(episodes: Sequence[dict[str, Any]], rule: PromoteParams) -> list[str]:
    """In words."""
    rate, mean = np.mean([row["clear"] for row in episodes]), np.mean([row["return"] for row in episodes])
    broken = []
    if rate < rule.clear_rate_min:
        broken.append(f"clear rate {rate:.0%} is below the floor promote.clear_rate_min, {rule.clear_rate_min:.0%}")
    if mean < rule.return_min:
        broken.append(f"mean return {mean:.0f} is below the floor promote.return_min, {rule.return_min:.0f}")
    return broken


def compare(
    challenger: Sequence[dict[str, Any]], champion: Sequence[dict[str, Any]], confidence: float
) -> dict[str, Any]:
    """The test that fits: of clears where there are any, else of returns."""
    clears = np.array([[row["clear"] for row in rows] for rows in (challenger, champion)], bool)
    if clears.any():
        return of_clears(clears[0], clears[1], confidence)
    returns = np.array([[row["return"] for row in rows] for rows in (challenger, champion)], float)
    return of_returns(returns[0], returns[1], confidence)


def of_clears(challenger: np.ndarray, champion: np.ndarray, confidence: float) -> dict[str, Any]:
    """McNemar's exact test, one-sided (McNemar 1947), of two (N,) bool."""
    from scipy.stats import binomtest

    won, lost = int((challenger & ~champion).sum()), int((champion & ~challenger).sum())
    p = float(binomtest(won, won + lost, 0.5, alternative="greater").pvalue) if won + lost else 1.0
    better = p <= 1 - confidence
    words = (
        f"clears {challenger.mean():.0%} against {champion.mean():.0%}; on {won} starts only the challenger cleared, "
        f"on {lost} only the champion (exact McNemar, one-sided p = {p:.3g}, "
        f"{'at most' if better else 'more than'} {1 - confidence:.3g})"
    )
    return {
        **{"name": "McNemar", "measure": "clear_rate", "better": better, "confidence": confidence, "words": words},
        **{"p": p, "won": won, "lost": lost, "difference": float(challenger.mean() - champion.mean())},
    }


def of_returns(challenger: np.ndarray, champion: np.ndarray, confidence: float) -> dict[str, Any]:
    """The paired bootstrap's lower bound of the mean difference, one-sided, of two (N,) float."""
    from scipy.stats import bootstrap

    differences = challenger - champion
    interval = bootstrap(
        (differences,),
        np.mean,
        confidence_level=confidence,
        alternative="greater",
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, mean = float(interval.low), float(differences.mean())
    better = low > 0
    words = (
        f"neither clears the level; return {challenger.mean():.0f} against {champion.mean():.0f}, "
        f"difference {mean:+.0f}, with {confidence:.3g} confidence at least {low:+.0f} (paired bootstrap), "
        f"{'above' if better else 'not above'} 0"
    )
    return {
        **{"name": "bootstrap", "measure": "return", "better": better, "confidence": confidence, "words": words},
        **{"difference": mean, "low": low},
    }
