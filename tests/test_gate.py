"""The decision: numbers in, verdict out."""

import numpy as np
import pytest

from stages import gate, params
from stages.params import PromoteParams

RULE = PromoteParams(episodes=100, envs=2, seed=1, confidence=0.95, clear_rate_min=0.0, return_min=0.0, automatic=False)


def rows(clears: list[int], returns: list[float] | None = None) -> list[dict]:
    returns = [4000.0 if clear else 900.0 for clear in clears] if returns is None else returns
    return [{"clear": bool(clear), "return": value} for clear, value in zip(clears, returns, strict=True)]


def pairs(both: int, won: int, lost: int, neither: int) -> tuple[list[dict], list[dict]]:
    return rows([1] * (both + won) + [0] * (lost + neither)), rows([1] * both + [0] * won + [1] * lost + [0] * neither)


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(10, 2, 79 / 4096), (5, 0, 1 / 32), (4, 0, 1 / 16), (0, 0, 1.0), (3, 3, 42 / 64), (0, 9, 1.0)],
)
def test_clears_are_judged_by_the_starts_on_which_they_differ(won, lost, p):
    """By hand: the chance of so many heads or more of won + lost coins."""
    verdict = gate.judge(*pairs(40, won, lost, 60 - won - lost), RULE)
    assert verdict["test"]["name"] == "McNemar"
    assert verdict["test"]["p"] == pytest.approx(p)
    assert verdict["status"] == ("PASS" if p <= 0.05 else "FAIL")
    assert f"on {won} starts only the challenger cleared, on {lost} only the champion" in verdict["reasons"][0]


def test_pairs_that_agree_tell_nothing():
    few, many = (gate.judge(*pairs(both, 6, 0, 94 - both), RULE)["test"]["p"] for both in (0, 94))
    assert few == many == pytest.approx(1 / 64)


def test_clears_count_more_than_returns():
    challenger, champion = rows([0] * 100, [3000.0] * 100), rows([1] * 10 + [0] * 90, [100.0] * 100)
    assert gate.judge(challenger, champion, RULE)["status"] == "FAIL"
    assert gate.judge(champion, challenger, RULE)["status"] == "PASS"


def test_without_clears_the_return_decides():
    rng = np.random.default_rng(3)
    start = rng.normal(600, 200, 100)  # what both get from a start, so that only pairs show the difference
    better, same = start + rng.normal(20, 30, 100), start + rng.normal(0, 30, 100)
    verdict = gate.judge(rows([0] * 100, better), rows([0] * 100, start), RULE)
    assert verdict["status"] == "PASS" and verdict["test"]["name"] == "bootstrap"
    differences = better - start
    normal = differences.mean() - 1.645 * differences.std(ddof=1) / 10
    assert verdict["test"]["low"] == pytest.approx(normal, abs=0.7)
    assert gate.judge(rows([0] * 100, same), rows([0] * 100, start), RULE)["status"] == "FAIL"
    assert gate.judge(rows([0] * 100, start), rows([0] * 100, better), RULE)["status"] == "FAIL"


def test_the_same_episodes_give_the_same_verdict_and_equals_are_no_better():
    rng = np.random.default_rng(0)
    one, other = (rows([0] * 100, rng.normal(500, 90, 100)) for _ in range(2))
    assert gate.judge(one, other, RULE) == gate.judge(one, other, RULE)
    assert gate.judge(one, one, RULE)["status"] == "FAIL"


def test_a_rate_of_false_alarms_that_keeps_its_promise():
    """Equal agents: a challenger passes in at most 5% of the cases (three deviations allowed)."""
    rng, n, passed = np.random.default_rng(7), 400, 0
    for _ in range(n):
        clears = rng.random((2, 100)) < 0.3
        passed += gate.of_clears(clears[0], clears[1], 0.95)["better"]
    assert passed <= n * 0.05 + 3 * np.sqrt(n * 0.05 * 0.95)


@pytest.mark.parametrize(
    ("floors", "words"), [({"clear_rate_min": 0.6}, "clear rate 50%"), ({"return_min": 3e3}, "return")]
)
@pytest.mark.parametrize("champion", [None, rows([0] * 100)])
def test_a_broken_floor_refuses_even_the_better_one(floors, words, champion):
    rule = PromoteParams.from_dict({**RULE.to_dict(), **floors})
    verdict = gate.judge(rows([1, 0] * 50), champion, rule)
    assert verdict["status"] == "FAIL"
    assert any(words in reason and "floor" in reason for reason in verdict["reasons"])


def test_the_first_one_needs_the_floors_only_and_the_verdict_says_so():
    verdict = gate.judge(rows([0] * 100), None, RULE)
    assert (verdict["status"], verdict["test"]) == ("PASS", None)
    assert "no champion to compare with" in verdict["reasons"][0]


@pytest.mark.parametrize(("changes", "words"), [({"episodes": 99}, "episodes"), ({"confidence": 1.0}, "confidence")])
def test_a_gate_that_could_not_tell_is_refused(changes, words):
    with pytest.raises(params.ConfigError, match=words):
        PromoteParams.from_dict({**RULE.to_dict(), **changes})
