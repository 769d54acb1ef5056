"""The training loop on a toy game of pixels: mastered, at the exact train ratio, and the same run when resumed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from agents import small_agent
from toy import Corridor

from dreamer import checkpoint
from dreamer.config import ReplayConfig, TrainingConfig
from dreamer.replay import Replay
from dreamer.rollout import Episode, Rollout, episode_seeds, play_episodes
from dreamer.training import Counters, Training

ENVS = 4


def make_training(seed: int = 0, train_ratio: float = 32.0, batch_length: int = 16, **changes) -> Training:
    torch.manual_seed(seed)
    agent = small_agent(**changes)
    envs = [Corridor() for _ in range(ENVS)]
    config = TrainingConfig(steps=1, envs=ENVS, batch_size=8, batch_length=batch_length, train_ratio=train_ratio)
    rollout = Rollout(envs, agent.policy(), episode_seeds(seed, "train"))
    streams = [f"env{i}" for i in range(ENVS)]
    rng = np.random.default_rng(seed)
    return Training(agent, Replay(ReplayConfig(100_000, 256)), rollout, config, streams, rng, Counters())


def score(episodes: list[Episode]) -> float:
    """Share of the best return there is from the same starts."""
    best = sum(Corridor.best_return(episode.info["start"]) for episode in episodes)
    return sum(episode.total_reward for episode in episodes) / best


@pytest.mark.timeout(900)
def test_the_toy_game_is_mastered():
    """At least 90% of the best return on starts that training has not drawn, from scratch with a fixed seed."""
    training = make_training()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small to share
    try:
        untrained = list(play_episodes([Corridor()], training.agent.policy(), range(1000, 1020)))
        for _ in training.run(4000):
            pass
        sampled = list(play_episodes([Corridor()], training.agent.policy(), range(1000, 1020)))
        greedy = list(play_episodes([Corridor()], training.agent.policy(greedy=True), range(1000, 1020)))
    finally:
        torch.set_num_threads(threads)
    assert score(untrained) < 0.2
    assert score(sampled) >= 0.9
    assert score(greedy) >= 0.9


def test_the_train_ratio_is_kept_exactly():
    training = make_training(train_ratio=10.0)
    price = 8 * 16
    waiting = True
    for progress in training.run(200):
        counters = progress.counters
        assert counters.decisions * 10 == counters.updates * price + counters.debt
        waiting = waiting and not counters.updates
        assert waiting or counters.debt < price  # what could not be spent before there was a sequence is made up for
    assert counters.updates == 200 * 10 // price == training.agent.updates
    assert len(training.replay) == counters.decisions + counters.episodes + sum(
        training.rollout.idle
    ) + ENVS - unstarted(training)


def unstarted(training: Training) -> int:
    """Environments whose episode has ended and whose next has not begun: no first step of theirs is in replay yet."""
    return int(training.rollout._now.is_last.sum())


def states_equal(one, two) -> None:
    assert type(one) is type(two) and (not isinstance(one, dict) or one.keys() == two.keys())
    if isinstance(one, dict):
        for key in one:
            states_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            states_equal(a, b)
    elif isinstance(one, torch.Tensor | np.ndarray):
        assert one.dtype == two.dtype and (np.asarray(one) == np.asarray(two)).all()
    else:
        assert one == two


@pytest.mark.parametrize("estimator", ["reinforce", "both"])
@pytest.mark.parametrize("cut", [37, 118, 240])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, cut: int, estimator: str):
    changes = {"behavior": {"imag_gradient": estimator}, "train_ratio": 16.0, "batch_length": 8}
    straight = make_training(**changes)
    for _ in straight.run(cut):
        pass
    updates_at_cut = straight.counters.updates
    straight.replay.save(tmp_path)
    state = {**straight.state_dict(), "replay": straight.replay.state_dict(), "random": checkpoint.random_state()}
    checkpoint.save(tmp_path / "cut.pt", state)
    first = [{k: v.item() for k, v in m.items()} for progress in straight.run(320) for m in progress.metrics]

    resumed = make_training(seed=99, **changes)  # everything of its own is different until the state is loaded
    state = checkpoint.load(tmp_path / "cut.pt")
    resumed.replay.load_state_dict(state["replay"], tmp_path)
    resumed.load_state_dict(state)
    resumed.rollout.seed_of = straight.rollout.seed_of
    checkpoint.load_random_state(state["random"])
    second = [{k: v.item() for k, v in m.items()} for progress in resumed.run(320) for m in progress.metrics]

    assert updates_at_cut < straight.counters.updates and len(first) > 3
    assert first == second
    states_equal(straight.state_dict(), resumed.state_dict())


def test_evaluation_between_rounds_changes_nothing():
    """Episodes played inside `fork_rng`, as the train stage does, leave training as it would have been."""
    plain, watched = (make_training(train_ratio=16.0, batch_length=8) for _ in range(2))
    torch.manual_seed(5)
    for _ in plain.run(160):
        pass
    torch.manual_seed(5)
    for progress in watched.run(160):
        if progress.counters.decisions % 40 == 0:
            with torch.random.fork_rng():
                list(play_episodes([Corridor()], watched.agent.policy(), [7]))
    states_equal(plain.state_dict(), watched.state_dict())
