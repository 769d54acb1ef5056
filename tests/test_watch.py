"""What the watch says of a training run, and when it stops one."""

import dataclasses
import math

import pytest

from dreamer.mario import ACTIONS
from dreamer.rollout import Episode
from stages import params, watch
from stages.watch import Diverged, Watch

SOUND = {"model_loss": 95.2, "value_loss": 4.1, "policy_entropy": 1.2, "imag_return": 310.0, "imag_value": 305.0}


@pytest.fixture
def watching():
    return Watch(params.load(), len(ACTIONS), "the/work")


def episode(clear: bool, best_x: int = 700) -> Episode:
    return Episode(seed=1, total_reward=0.0, decisions=9, options={}, info={"best_x": best_x, "clear": clear})


def test_sound_losses_pass_and_the_three_ends_are_told_apart(watching):
    watching.check(SOUND, 400)
    for name in SOUND:
        for bad in (math.nan, math.inf):
            with pytest.raises(Diverged, match=rf"{name} is not finite at 400 frames.*the/work.*lower optimizers"):
                watching.check(SOUND | {name: bad}, 400)
    with pytest.raises(Diverged, match="values explode at 800 frames: 1e"):
        watching.check(SOUND | {"imag_value": -1e7}, 800)
    sure = SOUND | {"policy_entropy": 0.06}
    with pytest.raises(Diverged, match=r"entropy has collapsed to 0.06 .*best.pt in the/work.*raise behavior.entropy"):
        for _ in range(watch.PATIENCE):
            watching.check(sure, 1200)


def test_a_return_that_the_game_can_give_is_no_explosion():
    of_document = params.load()
    undiscounted = dataclasses.replace(of_document, behavior=dataclasses.replace(of_document.behavior, discount=1.0))
    for each in (of_document, undiscounted):
        Watch(each, len(ACTIONS), "").finite({"imag_value": 4100.0}, 0)


def test_a_sure_policy_may_go_on_where_it_clears_or_only_for_a_moment(watching):
    sure = SOUND | {"policy_entropy": 0.06}
    for _ in range(3):
        watching.check(sure, 0)
        watching.check(sure, 0)
        watching.check(SOUND, 0)
    watching.episodes += [episode(False), episode(True)]
    for _ in range(5):
        watching.check(sure, 0)


def test_unimix_decides_how_sure_a_policy_can_be(watching):
    """The least entropy that the actor's own mixture leaves lies just under the limit, 1.3 times it well above."""
    unimix = params.load().behavior.unimix_ratio
    share = [1 - unimix + unimix / 7] + [unimix / 7] * 6
    least = -sum(p * math.log(p) for p in share)
    assert least < watching.entropy_limit < 1.3 * least


def test_a_policy_without_unimix_has_a_limit_too(watching):
    drawn = params.load()
    blindless = Watch(dataclasses.replace(drawn, behavior=dataclasses.replace(drawn.behavior, unimix_ratio=0.0)), 7, "")
    for _ in range(5):
        blindless.check(SOUND | {"policy_entropy": 0.05}, 0)
    with pytest.raises(Diverged, match=r"collapsed to 0\.01"):
        for _ in range(watch.PATIENCE):
            blindless.check(SOUND | {"policy_entropy": 0.01}, 0)


def test_one_line_a_minute_with_rates_since_the_last(watching, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    assert watching.line({"frames": 2000, "updates": 100}) is None
    now[0] += 59
    assert watching.line({"frames": 3000, "updates": 150}) is None
    watching.check(SOUND, 3000)
    watching.episodes += [episode(False, 500), episode(True, 3161)]
    now[0] += 1
    line = watching.line({"frames": 3200, "updates": 160})
    for part in (
        "3200 of ",
        "20 frames/s, 1.00 updates/s",
        "model 95.2",
        "entropy 1.2",
        "at most 3161, 1 cleared",
        "h left",
    ):
        assert part in line, line
    now[0] += 30
    assert watching.line({"frames": 4000, "updates": 200}) is None
