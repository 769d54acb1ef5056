"""Episodes that begin where earlier ones have been."""

import numpy as np
import pytest
from test_mario import CONFIG

from dreamer.archive import Archive
from dreamer.config import ArchiveConfig, ConfigError
from dreamer.mario import make_env
from dreamer.rollout import RandomPolicy, Rollout, episode_seeds

WALK = [10 * k for k in range(40)]  # best x after so many decisions


def walk(archive: Archive, steps: int, env: int = 0, name: int = 0, first: int = 0) -> None:
    """An episode of `steps` decisions, which begins after `first` of them."""
    for k in range(first, steps + 1):
        state = {"noops": name, "actions": list(range(k))}
        archive.see(env, k == first, {"decisions": k, "best_x": WALK[k]}, lambda state=state: state)


def test_a_place_is_kept_once_the_episode_has_lived_on():
    archive = Archive(ArchiveConfig(share=1.0, practice=0.0, cell=50, kept=2))
    walk(archive, 25)
    # Places are entered after 5, 10, ... decisions; an end after 25 leaves those that were entered up to 9.
    assert archive.places == {1: [{"noops": 0, "actions": list(range(5))}]}
    walk(archive, 26, name=1)
    assert sorted(archive.places) == [1, 2]
    assert [way["noops"] for way in archive.places[1]] == [0, 1]
    walk(archive, 39, name=2)
    assert [way["noops"] for way in archive.places[1]] == [1, 2] and sorted(archive.places) == [1, 2, 3, 4]
    walk(archive, 39, name=3, first=12)  # it was put into place 2, and reached 3 and 4 itself
    assert {place: [way["noops"] for way in ways] for place, ways in archive.places.items()} == {
        **{1: [1, 2], 2: [1, 2]},
        **{3: [2, 3], 4: [2, 3]},
    }


def test_environments_do_not_mix():
    archive = Archive(ArchiveConfig(share=1.0, practice=0.0, cell=50, kept=2))
    for k in range(24):
        for env, start in ((0, 0), (1, 10)):
            info = {"decisions": k, "best_x": WALK[k + start]}
            archive.see(env, k == 0, info, lambda env=env, k=k: {"noops": env, "actions": [env] * k})
    assert {place: [way["noops"] for way in ways] for place, ways in archive.places.items()} == {1: [0], 3: [1]}


def test_all_places_are_equally_likely_and_a_share_begins_there():
    archive = Archive(ArchiveConfig(share=0.75, practice=0.0, cell=50, kept=8))
    for name in range(8):
        walk(archive, 26, name=name)
    walk(archive, 39, name=99)
    drawn = [archive.draw(seed) for seed in range(2000)]
    assert drawn == [archive.draw(seed) for seed in range(2000)]
    lengths = [len(options["actions"]) for options in drawn if options]
    assert 0.72 < len(lengths) / 2000 < 0.78
    shares = [lengths.count(length) / len(lengths) for length in (5, 10, 15, 20)]
    assert sum(shares) == pytest.approx(1) and all(0.2 < share < 0.3 for share in shares)
    assert not any(Archive(ArchiveConfig(1.0, 0.0, 50, 8)).draw(seed) for seed in range(9))  # nowhere to begin yet


def test_practice_begins_shortly_before_a_failure():
    archive = Archive(ArchiveConfig(share=1.0, practice=0.5, cell=10, kept=1))
    walk(archive, 39)
    reached = sorted(archive.places)
    assert reached == list(range(1, 24))
    archive.fail({"best_x": 129})  # place 12
    drawn = [len(archive.draw(seed)["actions"]) for seed in range(4000)]
    near = [place for place in drawn if 5 <= place <= 12]
    assert sorted(set(drawn)) == reached and 0.64 < len(near) / 4000 < 0.71  # 1/2 + 1/2 * 8/23
    assert all(0.10 < near.count(place) / len(near) < 0.15 for place in range(5, 13))
    always = Archive(ArchiveConfig(share=1.0, practice=1.0, cell=10, kept=1))
    assert always.draw(0) == {}
    walk(always, 39)
    assert len({len(always.draw(seed)["actions"]) for seed in range(999)}) == 23  # none has failed yet
    for x in (15, *[230] * 15):
        always.fail({"best_x": x})
    assert {len(always.draw(seed)["actions"]) for seed in range(999)} == {1, *range(16, 24)}
    always.fail({"best_x": 230})  # the oldest failure is forgotten
    assert {len(always.draw(seed)["actions"]) for seed in range(999)} == set(range(16, 24))
    always.fail({"best_x": 3})
    assert min(len(always.draw(seed)["actions"]) for seed in range(999)) == 1  # the first place there is


def test_practice_ends_once_it_has_left_the_failure_behind():
    archive = Archive(ArchiveConfig(share=1.0, practice=1.0, cell=10, kept=1))
    walk(archive, 39)
    assert not any("until" in archive.draw(seed) for seed in range(99))  # none has failed yet, so none practises
    archive.fail({"best_x": 129})
    assert {archive.draw(seed)["until"] for seed in range(99)} == {200}  # 8 places after the 12th
    archive.failures.clear()
    archive.fail({"best_x": 3})  # before the first place there is, so they begin at that
    assert {archive.draw(seed)["until"] for seed in range(99)} == {90}
    both = Archive(ArchiveConfig(share=1.0, practice=0.5, cell=10, kept=1))
    walk(both, 39)
    both.fail({"best_x": 129})
    assert 0.45 < sum("until" in both.draw(seed) for seed in range(999)) / 999 < 0.55


def test_an_episode_of_practice_is_cut_off_and_its_value_goes_on():
    """With the real game, in which blind play often gets past 64 pixels more."""
    archive = Archive(ArchiveConfig(share=0.9, practice=0.5, cell=8, kept=2))
    rollout = Rollout([make_env(CONFIG)], RandomPolicy([0, 1, 2, 2, 4, 0, 0], 3), episode_seeds(3, "cut"), archive)
    ended, terminal = [], []
    while len(ended) < 40:
        steps, new, _ = rollout.step()
        ended += new
        terminal += [bool(steps.is_terminal[0])] * len(new)
    kinds = {"passed": 0, "practised to its end": 0, "other": 0}
    for episode, is_terminal in zip(ended, terminal, strict=True):
        until, outcome = episode.options.get("until"), episode.info["outcome"]
        if until is None:
            assert outcome != "passed"
            kinds["other"] += 1
        elif outcome == "passed":
            assert episode.info["best_x"] >= until and not is_terminal and not episode.info["clear"]
            kinds["passed"] += 1
        else:
            assert is_terminal == (outcome in ("death", "flag"))
            assert episode.info["best_x"] < until or is_terminal
            kinds["practised to its end"] += 1
    assert min(kinds.values()) > 0, kinds
    assert all(way.keys() == {"noops", "actions"} for ways in archive.places.values() for way in ways)
    rollout.stop()


def test_what_fails_is_an_episode_from_the_start_that_does_not_clear():
    archive = Archive(ArchiveConfig(share=0.5, practice=0.5, cell=64, kept=2))
    rollout = Rollout([make_env(CONFIG)], RandomPolicy([0, 1, 2, 2, 4, 0, 0], 3), episode_seeds(3, "fail"), archive)
    ended = []
    while len(ended) < 8:
        ended += rollout.step()[1]
    expected = [episode.info["best_x"] // 64 for episode in ended if not episode.replayed]
    assert 0 < len(expected) < 8 and list(archive.failures) == expected
    restored = Archive(archive.config)
    restored.load_state_dict(archive.state_dict())
    assert restored.failures == archive.failures
    rollout.stop()


def test_an_episode_begins_as_the_earlier_one_was_then():
    """With the real game: from the same moment, the same screens, rewards and ends."""
    archive = Archive(ArchiveConfig(share=1.0, practice=0.0, cell=64, kept=2))
    env, twin = make_env(CONFIG), make_env(CONFIG)
    rollout = Rollout([env], RandomPolicy([0, 1, 2, 2, 4, 0, 0], 3), episode_seeds(3, "archive"), archive)
    seen, trails = [], {}
    while len(seen) < 6:
        steps, ended, _ = rollout.step()
        episode = rollout.running[0]
        trails.setdefault(episode.seed, []).append((int(steps.action[0]), steps.obs[0].copy(), float(steps.reward[0])))
        seen += ended
    begun = [episode for episode in seen if episode.replayed]
    assert begun and not seen[0].replayed
    for episode in begun:
        obs, info = twin.reset(options=episode.options)
        assert info["decisions"] == episode.replayed and info["best_x"] > 64
        (_, first, nothing), *rest = trails[episode.seed]
        assert (obs == first).all() and nothing == 0
        for action, expected, reward in rest:
            obs, got, _, _, info = twin.step(action)
            assert (obs == expected).all() and got == np.float32(reward)
        assert info == episode.info and info["decisions"] == episode.replayed + episode.decisions
    rollout.stop()


def test_it_travels_as_a_file_and_as_a_state(tmp_path):
    archive = Archive(ArchiveConfig(share=1.0, practice=0.0, cell=50, kept=2))
    walk(archive, 30)
    archive.save(tmp_path / "archive.json")
    loaded, restored = (Archive(archive.config) for _ in range(2))
    loaded.load(tmp_path / "archive.json")
    assert loaded.places == archive.places
    state = archive.state_dict()
    walk(archive, 39, first=31)  # changes nothing of what was taken before
    restored.load_state_dict(state)
    assert restored.places == loaded.places
    assert [restored.draw(seed) for seed in range(20)] == [loaded.draw(seed) for seed in range(20)]


@pytest.mark.parametrize("key, value", [("share", 1.1), ("practice", -0.1), ("cell", 0), ("kept", 0)])
def test_nonsense_is_named(key, value):
    values = {"share": 0.5, "practice": 0.5, "cell": 32, "kept": 8, key: value}
    with pytest.raises(ConfigError, match=f"archive.{key}: must"):
        ArchiveConfig.from_dict(values, "archive")
