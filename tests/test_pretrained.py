"""The agent that ships with the repository gets where its card says."""

import json
import math

import pandas as pd
import pytest
from clones import ROOT, run

from stages import bundle, card
from stages.evaluate import MODES
from stages.export import LIMIT

PRETRAINED = ROOT / "pretrained"
EPISODES, SEED = 6, 777_000  # starts that nothing else uses


@pytest.fixture(scope="module")
def config():
    return bundle.read_config(PRETRAINED)


def test_it_is_small_and_whole(config):
    assert (PRETRAINED / bundle.WEIGHTS).stat().st_size <= LIMIT
    assert config["env"]["stall_limit"] and config["lineage"]["params"]["archive"]["share"] > 0


def test_its_card_says_what_was_measured(config):
    assert (PRETRAINED / bundle.CARD).read_text() == card.write(config["lineage"], config["frames"])
    sampled = config["lineage"]["evaluation"]["sampled"]
    assert sampled["episodes"] >= 200
    assert len(sampled["failures"]) == round((1 - sampled["clear_rate"]) * sampled["episodes"])


def test_its_curves_are_of_its_training(config):
    lineage = config["lineage"]
    runs = [pd.read_csv(path) for path in sorted(PRETRAINED.glob("curves/*/evaluations.csv"))]
    chosen = [run[(run.frames == config["frames"]) & (run.best == 1)] for run in runs]
    assert any(len(row) and row.eval_return.iloc[0] == pytest.approx(config["score"]) for row in chosen)
    assert lineage["training"]["decisions"] >= config["frames"] // 4


@pytest.mark.parametrize("mode", MODES)
def test_it_plays_as_well_as_its_card_says(config, mode):
    """From starts that nobody chose: within what chance leaves of the measured rate, and as far and as fast."""
    done = run(
        ROOT, "python", "-m", "stages", "play", "--model", "pretrained", "--json",
        *("--episodes", str(EPISODES), "--seed", str(SEED), *(["--deterministic"] if mode == "greedy" else [])),
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    played, told = json.loads(done.stdout), config["lineage"]["evaluation"][mode]
    clears = [row for row in played["episodes"] if row["clear"]]
    # As few clears or fewer have a chance below one in ten thousand at the lower end of the measured interval.
    rate, chance, least = told["clear_rate_low"], 0.0, 0
    for k in range(EPISODES + 1):
        chance += _binomial(k, EPISODES, rate)
        if chance > 1e-4:
            least = k
            break
    assert len(clears) >= max(1, least)
    assert all(row["best_x"] == told["best_x_max"] for row in clears)
    fastest = min(row["decisions"] for row in clears)
    assert 0.8 * told["decisions_to_flag"] < fastest < 1.5 * told["decisions_to_flag"]


def _binomial(k: int, n: int, rate: float) -> float:
    return math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
