"""The training loop on a toy game of pixels: mastered, at the exact train ratio, and the same run when resumed or when
nothing is done side by side."""

import dataclasses
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from agents import small_agent
from toy import Corridor

from dreamer import checkpoint
from dreamer.config import ComputeConfig, ReplayConfig, TrainingConfig
from dreamer.replay import DETER_SCALE, Replay
from dreamer.rollout import Episode, Rollout, episode_seeds, play_episodes
from dreamer.training import Counters, Training

ENVS = 4
TINY = {
    "model": {"deter": 16, "stoch": 4, "classes": 4, "hidden": 16, "depth": 2, "units": 16, "layers": 1},
    "behavior": {"imag_horizon": 3},
}


def make_training(
    seed: int = 0,
    train_ratio: float = 32.0,
    batch_length: int = 16,
    envs: int = ENVS,
    kind: type[Corridor] = Corridor,
    context: bool = True,
    pretrain: int = 0,
    **changes,
) -> Training:
    torch.manual_seed(seed)
    agent = small_agent(**changes)
    config = TrainingConfig(1, envs, 8, batch_length, train_ratio, pretrain)
    rollout = Rollout([kind() for _ in range(envs)], agent.policy(), episode_seeds(seed, "train"))
    replay = Replay(ReplayConfig(100_000, 256, context, 0.0, 2000))
    streams = [f"env{i}" for i in range(envs)]
    return Training(agent, replay, rollout, config, streams, np.random.default_rng(seed), Counters())


def score(episodes: list[Episode]) -> float:
    """Share of the best return there is from the same starts."""
    best = sum(Corridor.best_return(episode.info["start"]) for episode in episodes)
    return sum(episode.total_reward for episode in episodes) / best


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fast", [False, True], ids=["float32", "bfloat16 with kernels"])
def test_the_toy_game_is_mastered(fast: bool):
    """At least 90% of the best return on starts that training has not drawn, from scratch with a fixed seed. Of seeds 0
    to 3 the first settles for a detour, 88%, with contexts and without; the others reach 98% to 100%."""
    changes = {"compute": ComputeConfig("cpu", "bfloat16", True), "model": {"classes": 16}} if fast else {}
    training = make_training(seed=1, **changes)
    torch.set_num_threads(1)  # the networks are too small to share
    untrained = list(play_episodes([Corridor()], training.agent.policy(), range(1000, 1020)))
    for _ in training.run(4000):
        pass
    sampled = list(play_episodes([Corridor()], training.agent.policy(), range(1000, 1020)))
    greedy = list(play_episodes([Corridor()], training.agent.policy(greedy=True), range(1000, 1020)))
    assert score(untrained) < 0.2
    assert score(sampled) >= 0.9
    assert score(greedy) >= 0.9


@pytest.mark.parametrize("envs", [1, 3, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.75, 10.0, 70.25])  # exact in binary, so that sums of them are
def test_the_train_ratio_is_kept_exactly(ratio: float, envs: int):
    training = make_training(train_ratio=ratio, envs=envs, batch_length=4, **TINY)
    price = 8 * 4
    for progress in training.run(50 * envs):
        counters = progress.counters
        assert counters.decisions * ratio == counters.updates * price + counters.debt
        # What could not be spent before there was a sequence is made up for.
        assert counters.debt < price or counters.decisions < 4 * envs
    assert counters.updates == counters.decisions * ratio // price == training.agent.updates
    assert len(training.replay) == counters.decisions + counters.episodes + envs - unstarted(training)


def unstarted(training: Training) -> int:
    """Environments whose episode has ended and whose next has not begun: no first step of theirs is in replay yet."""
    return int(training.rollout._now.is_last.sum())


class Lagging(Corridor):
    """Takes now this long, now that."""

    def step(self, action: int):
        time.sleep(0.004 * np.random.random() ** 4)
        return super().step(action)


def in_turn(training: Training, decisions: int) -> list[dict[str, float]]:
    """`Training.run`, one thing after the other: the step is made first, and put aside until the updates are done."""
    agent, replay, rollout, counters = training.agent, training.replay, training.rollout, training.counters
    size, length = training.config.batch_size, training.config.batch_length
    found, before = [], None
    while counters.decisions < decisions:
        steps, episodes, taken = rollout.step()
        steps, latents = steps.copy(), rollout.policy.latents() if taken else None
        counters.decisions += taken
        counters.debt += training.config.train_ratio * taken
        while counters.debt >= size * length and replay.starts(length):
            batch = replay.sample(size, length, training.rng)
            metrics, states = agent.update(batch)
            if before:
                replay.refresh(*before)
            stoch, deter = states[0].numpy().astype(np.uint8), states[1].numpy() * np.float32(DETER_SCALE)
            before = batch.origins, stoch, np.rint(deter).astype(np.int8)
            found.append({name: value.item() for name, value in metrics.items()})
            counters.updates += 1
            counters.debt -= size * length
        replay.add(training.streams, steps, latents)
        counters.episodes += len(episodes)
    return found


@pytest.mark.parametrize(("envs", "ratio"), [(1, 8.0), (3, 24.0)])
def test_side_by_side_is_the_same_as_in_turn(envs: int, ratio: float):
    settings = {"envs": envs, "train_ratio": ratio, "batch_length": 8, **TINY}
    parallel, serial = make_training(kind=Lagging, **settings), make_training(**settings)
    torch.manual_seed(5)
    one = [{k: v.item() for k, v in m.items()} for progress in parallel.run(50 * envs) for m in progress.metrics]
    torch.manual_seed(5)
    two = in_turn(serial, 50 * envs)
    assert len(one) > 5 and one == two
    states = [training.state_dict() for training in (parallel, serial)]
    for state in states:
        del state["posterior"]
    states_equal(*states)
    states_equal(parallel.replay.state_dict(), serial.replay.state_dict())


def test_updates_are_done_while_the_environments_step():
    updated = threading.Event()

    class Patient(Corridor):
        def step(self, action: int):
            return *super().step(action)[:4], {"done": updated.wait(20)}

    training = make_training(kind=Patient, envs=2, train_ratio=64.0, batch_length=8, **TINY)  # an update a decision
    update, waited = training.agent.update, 0

    def notify(batch):
        updated.set()
        return update(batch)

    training.agent.update = notify
    updated.set()
    for progress in training.run(60):
        assert all(episode.info.get("done", True) for episode in training.rollout.running)
        if progress.counters.updates:
            updated.clear()
            waited += 1
    assert waited > 10


def test_what_an_environment_raises_ends_the_run():
    class Broken(Corridor):
        def step(self, action: int):
            if self.time == 5:
                raise OSError("the cable is out")
            return super().step(action)

    training = make_training(kind=Broken, train_ratio=8.0, batch_length=4, **TINY)
    with pytest.raises(OSError, match="the cable is out"):
        for _ in training.run(1000):
            pass
    assert training.counters.updates


def held(replay: Replay) -> dict[tuple[str, int], tuple[bool, bool, list[int], list[int]]]:
    """Of every step: whether it is a first one, whether its context is known, and that."""
    return {
        (chunk.stream, chunk.start + t): (
            bool(chunk.flags[t] & 1),
            bool(chunk.context.known[t]),
            chunk.context.stoch[t].tolist(),
            chunk.context.deter[t].tolist(),
        )
        for chunk in replay._chunks
        for t in range(chunk.length)
    }


def test_fresh_steps_start_from_the_state_the_policy_acted_in():
    training = make_training(train_ratio=0.0, envs=2, **TINY)
    expected, count = {}, 0
    for progress in training.run(100):
        if progress.counters.decisions:  # the policy's state is now that of the step before
            stoch, deter = training.rollout.policy.latents()
            for i, stream in enumerate(training.streams):
                expected[stream, count] = stoch[i].tolist(), np.rint(deter[i] * DETER_SCALE).tolist()
        count += 1
    found = held(training.replay)
    assert len(found) == 2 * count and len({str(state) for *_, state in found.values()}) > count
    for key, (first, known, *state) in found.items():
        assert first or (known and tuple(state) == expected[key])


def test_an_update_s_states_are_written_after_the_next_update():
    training = make_training(train_ratio=16.0, batch_length=8, **TINY)
    pending, checked = None, 0
    for progress in training.run(200):
        if len(progress.metrics) == 1 and pending:
            found, last = held(training.replay), {}
            for b, (stream, number) in enumerate(pending["origins"]):  # where they overlap, the later sequence counts
                for k in range(8):
                    last[stream, number + k + 1] = pending["stoch"][b, k].tolist(), pending["deter"][b, k].tolist()
            for key, state in last.items():
                assert key not in found or tuple(found[key][2:]) == state
                checked += key in found
        if progress.metrics:
            pending = training.state_dict()["posterior"]
    assert checked > 500


def test_without_contexts_none_is_kept():
    training = make_training(train_ratio=16.0, batch_length=8, context=False, **TINY)
    for _ in training.run(100):
        pass
    assert training.counters.updates and training.state_dict()["posterior"] is None
    assert all(chunk.context is None for chunk in training.replay._chunks)


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
    behavior = {"imag_gradient": estimator, "entropy_final": 3e-5, "model_average": 0.9}
    changes = {"behavior": behavior, "optimizers": {"lr_decay": 0.5}, "train_ratio": 16.0, "batch_length": 8}
    updates_at_cut = None
    straight, first = make_training(**changes), []
    for progress in straight.run(320):
        if updates_at_cut is not None:
            first += [{k: v.item() for k, v in m.items()} for m in progress.metrics]
        elif progress.counters.decisions >= cut:
            updates_at_cut = straight.counters.updates
            straight.replay.save(tmp_path)
            state = {**straight.state_dict(), "replay": straight.replay.state_dict()}
            checkpoint.save(tmp_path / "cut.pt", {**state, "random": checkpoint.random_state()})
            assert bool(state["posterior"]) == bool(updates_at_cut)

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
    assert held(straight.replay) == held(resumed.replay)


def test_pretraining_takes_no_decision_and_goes_on_where_it_was(tmp_path: Path):
    """Updates before the first decision are extra to what the ratio earns, and a checkpoint among them loses none."""
    straight, resumed = make_training(batch_length=8, **TINY), make_training(seed=99, batch_length=8, **TINY)
    for training in (straight, resumed):
        training.config = dataclasses.replace(training.config, train_ratio=0.0)
    for _ in straight.run(60):
        pass
    straight.config = resumed.config = dataclasses.replace(straight.config, train_ratio=16.0, pretrain=7)
    ran = straight.run(straight.counters.decisions + 40)
    first = [(progress.counters.decisions, len(progress.metrics)) for progress in itertools.islice(ran, 3)]
    assert first == [(straight.counters.decisions, 1)] * 3
    state = {**straight.state_dict(), "replay": straight.replay.state_dict(), "random": checkpoint.random_state()}
    checkpoint.save(tmp_path / "cut.pt", state)
    for _ in ran:
        pass
    assert straight.counters.updates == 7 + 40 * 16 // (8 * 8)

    state = checkpoint.load(tmp_path / "cut.pt")
    resumed.replay.load_state_dict(state["replay"])
    resumed.load_state_dict(state)
    resumed.rollout.seed_of = straight.rollout.seed_of
    checkpoint.load_random_state(state["random"])
    for _ in resumed.run(straight.counters.decisions):
        pass
    states_equal(straight.state_dict(), resumed.state_dict())


def test_entropy_weighs_less_and_less_after_the_seed_data():
    """It stays through the updates on seed data, whose decisions do not count, and comes to its last at the end."""
    behavior = {**TINY["behavior"], "entropy": 0.08, "entropy_final": 0.005}
    collected = make_training(batch_length=8, **{**TINY, "behavior": behavior})
    for _ in collected.run(60):
        pass
    config = dataclasses.replace(collected.config, train_ratio=64.0, pretrain=3)
    parts = collected.agent, collected.replay, collected.rollout, config, collected.streams, collected.rng
    training = Training(*parts, Counters(decisions=collected.counters.decisions))
    seeded, weights = training.counters.decisions, []
    for progress in training.run(seeded + 64):
        weights += [(progress.counters.decisions - seeded, training.agent.actor_critic.entropy_weight.item())]
    assert [weight for decisions, weight in weights if decisions == 0] == [pytest.approx(0.08)] * 3
    later = [(decisions, weight) for decisions, weight in weights if decisions]
    assert later == [(decisions, pytest.approx(0.08 - 0.075 * decisions / 64)) for decisions, _ in later]
    assert later[-1] == (64, pytest.approx(0.005))


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
