"""Replay: what goes in comes out, in memory and on disk, and damage is noticed."""

import numpy as np
import pytest

from dreamer.config import ReplayConfig
from dreamer.replay import DETER_SCALE, ChunkError, Replay, digest
from dreamer.rollout import NO_ACTION, Steps

EPISODE = 13  # steps


def step(t: int, streams: int) -> Steps:
    """The image of step t of stream i is filled with t, and i in the last channel."""
    obs = np.full((streams, 64, 64, 3), t % 256, np.uint8)
    obs[..., 2] = np.arange(streams)[:, None, None]
    first, last = np.full(streams, t % EPISODE == 0), np.full(streams, t % EPISODE == EPISODE - 1)
    action = np.where(first, NO_ACTION, t % 7)
    return Steps(obs, action, np.full(streams, t, np.float32), first, last, last & (t % 2 == 0))


def state(streams: np.ndarray | list[int], numbers: np.ndarray | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What the model's state before these steps is said to be: classes (N, 3) uint8 and h (N, 5) float32. No two steps
    have the same, and the values of h are such that int8 can hold."""
    streams, numbers = np.asarray(streams), np.asarray(numbers)
    stoch = np.stack([numbers % 256, numbers // 256, streams], -1).astype(np.uint8)
    whole = np.stack([numbers % 127, numbers // 127, -streams, 0 * streams + 127, 0 * streams - 127], -1)
    return stoch, (whole / 127).astype(np.float32)


def filled(
    steps: int,
    streams: int = 2,
    capacity: int = 10_000,
    chunk_length: int = 16,
    contexts: bool = False,
    recent: tuple[float, int] = (0.0, 2000),
) -> Replay:
    replay = Replay(ReplayConfig(capacity, chunk_length, True, *recent))
    for t in range(steps):
        latents = state(np.arange(streams), np.full(streams, t)) if contexts else None
        replay.add([f"env{i}" for i in range(streams)], step(t, streams), latents)
    return replay


def check(replay: Replay, length: int, draws: int = 200) -> set[tuple[int, int]]:
    """Samples and compares with what `step` made; returns the (stream, t) at which sequences began."""
    batch = replay.sample(draws, length, np.random.default_rng(0))
    starts = set()
    for b in range(draws):
        t0, stream = int(batch.reward[b, 0]), int(batch.obs[b, 0, 0, 0, 2])
        starts.add((stream, t0))
        for k in range(length):
            expected = step(t0 + k, stream + 1)
            for name, array in batch.arrays().items():
                assert (array[b, k] == getattr(expected, name)[stream]).all(), (name, t0, k)
        assert batch.origins[b] == (f"env{stream}", t0)
    return starts


def test_sequences_are_consecutive_across_chunks_and_episodes():
    check(filled(100), length=40)


def test_every_start_is_drawn_and_none_else():
    replay = filled(40, streams=2)
    assert replay.starts(8) == 2 * 33
    assert check(replay, 8, draws=2000) == {(stream, t) for stream in range(2) for t in range(33)}


def test_starts_are_uniform_over_streams_of_different_length():
    replay = filled(20, streams=1)
    for t in range(100):
        replay.add(["long"], step(t, 1))
    batch = replay.sample(20_000, 5, np.random.default_rng(1))
    counts = np.bincount(batch.reward[:, 0].astype(int), minlength=96)
    # starts 0 to 15 exist twice
    expected = np.where(np.arange(96) < 16, 2, 1) * 20_000 / 112
    assert ((counts - expected) ** 2 / expected).sum() < 96 + 5 * np.sqrt(2 * 96)


class TestRecentSteps:
    def test_the_share_starts_among_the_last_of_the_streams_that_grow(self):
        replay = filled(100, streams=3, recent=(0.25, 21))
        for t in range(100, 150):
            two = {name: array[1:] for name, array in vars(step(t, 3)).items()}
            replay.add(["env1", "env2"], Steps(**two))
        batches = [replay.sample(8, 5, np.random.default_rng(seed)) for seed in range(300)]
        recent = {origin for batch in batches for origin in batch.origins[:2]}
        assert recent == {(stream, 146 - k) for stream in ("env1", "env2") for k in range(1, 11)}
        others = [origin for batch in batches for origin in batch.origins[2:]]
        assert {stream for stream, _ in others} == {"env0", "env1", "env2"} and min(t for _, t in others) < 5
        assert len(set(others)) > 300

    def test_a_stream_shorter_than_recent_gives_all_it_has(self):
        replay = filled(9, streams=1, recent=(1.0, 2000))
        assert {n for _, n in replay.sample(200, 5, np.random.default_rng(0)).origins} == set(range(5))

    def test_what_was_only_loaded_is_not_recent(self, tmp_path):
        filled(100, recent=(1.0, 10)).save(tmp_path, partial=True)
        replay = Replay(ReplayConfig(1000, 16, True, 1.0, 10))
        replay.load(tmp_path)
        assert len(set(replay.sample(400, 5, np.random.default_rng(0)).origins)) > 100

    def test_a_restored_replay_draws_the_same(self, tmp_path):
        replay = filled(100, recent=(0.5, 30))
        replay.save(tmp_path)
        restored = Replay(replay.config)
        restored.load_state_dict(replay.state_dict(), tmp_path)
        one, two = (each.sample(40, 5, np.random.default_rng(2)).origins for each in (replay, restored))
        assert one == two and min(t for _, t in one[:20]) >= 100 - 5 - 15 + 1


def test_too_short_is_an_error_with_the_numbers():
    with pytest.raises(ValueError, match="no stream of the replay has 21 steps yet: it holds 40"):
        filled(20).sample(1, 21, np.random.default_rng(0))


def test_decisions_are_steps_that_are_not_first():
    assert filled(30, streams=2).decisions == 2 * (30 - 3)


def test_oldest_chunks_go_when_capacity_is_reached():
    replay = filled(200, streams=1, capacity=64, chunk_length=16)
    assert 64 <= len(replay) <= 64 + 16
    starts = check(replay, 8)
    assert min(t for _, t in starts) >= 200 - 80


class TestDisk:
    def test_roundtrip(self, tmp_path):
        replay = filled(50)
        replay.save(tmp_path, partial=True)
        loaded = Replay(replay.config)
        loaded.load(tmp_path)
        assert len(loaded) == 100 and loaded.decisions == replay.decisions
        check(loaded, 30)

    def test_same_experience_same_bytes(self, tmp_path):
        for name in ("a", "b"):
            filled(50).save(tmp_path / name, partial=True)
        files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
        assert files[0] == files[1] and len(files[0]) == 8
        assert digest(tmp_path / "a") == digest(tmp_path / "b")

    def test_chunks_are_written_once_and_growing_ones_not_at_all(self, tmp_path):
        replay = filled(40)
        replay.save(tmp_path)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert len(before) == 2 * 2
        replay.save(tmp_path)
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before

    def test_prune_leaves_what_is_held(self, tmp_path):
        replay = filled(64, streams=1, capacity=32)
        replay.save(tmp_path)
        (tmp_path / "old-000000000-00016-0123456789abcdef.npz").write_bytes(b"")
        (tmp_path / "keep.txt").write_text("not ours")
        held = sorted(replay.state_dict()["files"])
        replay.prune(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*held, "keep.txt"])

    @pytest.mark.parametrize("damage", ["truncated", "edited", "emptied"])
    def test_damage_is_named(self, tmp_path, damage):
        filled(50).save(tmp_path, partial=True)
        path = sorted(tmp_path.iterdir())[3]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:-100], "edited": content, "emptied": b""}[damage])
        with pytest.raises(ChunkError) as error:
            Replay(ReplayConfig(100, 16, context=True, recent_share=0.0, recent_steps=2000)).load(tmp_path)
        assert str(path) in str(error.value) and "dvc checkout" in str(error.value) and "\n" not in str(error.value)

    def test_a_foreign_file_is_named(self, tmp_path):
        filled(50).save(tmp_path)
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(ChunkError, match=r"notes\.txt: not a replay chunk"):
            Replay(ReplayConfig(100, 16, context=True, recent_share=0.0, recent_steps=2000)).load(tmp_path)

    def test_an_empty_directory_is_an_error(self, tmp_path):
        with pytest.raises(ChunkError, match="holds no replay chunks"):
            Replay(ReplayConfig(100, 16, context=True, recent_share=0.0, recent_steps=2000)).load(tmp_path)

    def test_state_restores_growing_chunks_and_order(self, tmp_path):
        replay = filled(70, streams=2, capacity=100)
        replay.save(tmp_path)
        restored = Replay(replay.config)
        restored.load_state_dict(replay.state_dict(), tmp_path)
        assert len(restored) == len(replay)
        for t in range(70, 120):
            for each in (replay, restored):
                each.add(["env0", "env1"], step(t, 2))
        one, two = (each.sample(50, 20, np.random.default_rng(2)) for each in (replay, restored))
        assert all((array == two.arrays()[name]).all() for name, array in one.arrays().items())
        check(restored, 20)

    def test_a_missing_chunk_of_a_checkpoint_is_named(self, tmp_path):
        replay = filled(70)
        replay.save(tmp_path)
        state = replay.state_dict()
        (tmp_path / state["files"][2]).unlink()
        with pytest.raises(ChunkError, match=f"{state['files'][2]}: missing"):
            Replay(replay.config).load_state_dict(state, tmp_path)


def contexts(replay: Replay) -> dict[tuple[str, int], tuple[list[int], list[int]]]:
    """All that are known, by stream and number of the step."""
    return {
        (chunk.stream, chunk.start + i): (chunk.context.stoch[i].tolist(), chunk.context.deter[i].tolist())
        for chunk in replay._chunks
        if chunk.context
        for i in np.flatnonzero(chunk.context.known)
    }


def refresh(replay: Replay, origins: list[tuple[str, int]], length: int) -> set[tuple[str, int]]:
    """With the posterior states of sequences from `origins`; returns the steps whose contexts these should be."""
    streams, numbers = [int(stream[3:]) for stream, _ in origins], np.array([number for _, number in origins])
    after = numbers[:, None] + np.arange(1, length + 1)
    stoch, deter = state(np.repeat(np.array(streams)[:, None], length, 1), after)
    replay.refresh(origins, stoch, np.rint(deter * DETER_SCALE).astype(np.int8))
    return {(stream, number + k) for stream, number in origins for k in range(1, length + 1)}


def right(found: dict[tuple[str, int], tuple[list[int], list[int]]]) -> bool:
    return all(
        stoch == state(int(stream[3:]), number)[0].tolist()
        and deter == np.rint(127 * state(int(stream[3:]), number)[1]).tolist()
        for (stream, number), (stoch, deter) in found.items()
    )


class TestContexts:
    def test_the_policy_s_states_come_back_with_the_sequences_that_begin_there(self):
        batch = filled(300, contexts=True).sample(200, 10, np.random.default_rng(0))
        stoch, deter = state([int(stream[3:]) for stream, _ in batch.origins], [number for _, number in batch.origins])
        assert batch.context.known.all()
        assert (batch.context.stoch == stoch).all() and (batch.context.deter == deter).all()
        assert batch.context.stoch.dtype == np.uint8 and batch.context.deter.dtype == np.float32

    def test_h_is_held_to_a_254th(self):
        replay, rng = (
            Replay(ReplayConfig(1000, 64, context=True, recent_share=0.0, recent_steps=2000)),
            np.random.default_rng(0),
        )
        deter = np.append(rng.uniform(-1, 1, 4094), [-1.0001, 1.0001]).astype(np.float32)
        for t in range(2):
            replay.add(["env0"], step(t, 1), (np.zeros((1, 3), np.uint8), deter[None]))
        error = replay.sample(1, 2, rng).context.deter[0] - deter
        assert np.abs(error).max() <= 1 / 254 + 1e-3 / 127 and np.sqrt((error**2).mean()) < 0.0024

    def test_none_where_none_was_given(self):
        assert filled(50).sample(20, 8, np.random.default_rng(0)).context is None

    def test_refreshed_are_the_steps_after_each_that_exist(self):
        """Across chunks of 16, up to the end of the stream, and no other step."""
        replay = filled(100)
        written = refresh(replay, [("env0", 3), ("env1", 14), ("env0", 90), ("env1", 0), ("env1", 15)], 10)
        assert contexts(replay).keys() == written - {("env0", 100)} and right(contexts(replay))
        batch = replay.sample(500, 8, np.random.default_rng(0))
        assert [origin in written for origin in batch.origins] == batch.context.known.tolist()

    def test_refreshed_states_replace_older_ones(self):
        replay = filled(100, contexts=True)
        for chunk in replay._chunks:
            chunk.context.stoch[:], chunk.context.deter[:] = 9, 9
        written = refresh(replay, [("env1", 20)], 30)
        found = contexts(replay)
        assert right({key: found[key] for key in written})
        assert all(set(found[key][0] + found[key][1]) == {9} for key in found.keys() - written)

    def test_a_step_that_came_after_the_sample_is_refreshed(self):
        replay = filled(20)
        origins = [("env0", 10), ("env1", 10)]
        replay.add(["env0", "env1"], step(20, 2))
        assert refresh(replay, origins, 10) == contexts(replay).keys()

    def test_steps_no_longer_held_are_let_go(self):
        replay = filled(60, streams=1, capacity=32)
        origins = [("env0", number) for number in (0, 10, 25, 49)]
        for t in range(60, 80):
            replay.add(["env0"], step(t, 1))
        begin = replay._chunks[0].start
        assert 25 < begin < 49
        written = refresh(replay, origins, 10)
        assert contexts(replay).keys() == {key for key in written if key[1] >= begin}
        assert right(contexts(replay))

    def test_a_gap_in_a_stream_is_not_crossed(self, tmp_path):
        filled(64, streams=1).save(tmp_path)
        sorted(tmp_path.iterdir())[1].unlink()
        replay = Replay(ReplayConfig(1000, 16, context=True, recent_share=0.0, recent_steps=2000))
        replay.load(tmp_path)
        refresh(replay, [("env0", 10), ("env0", 6)], 10)
        assert contexts(replay).keys() == {("env0", number) for number in range(7, 16)}
        check(replay, 16)

    def test_a_transition_takes_at_most_13_000_bytes(self):
        """At the document's sizes; and nothing more than the images and their kin where there are no contexts."""

        def size(latents) -> float:
            replay = Replay(ReplayConfig(1000, 128, context=True, recent_share=0.0, recent_steps=2000))
            for t in range(256):
                replay.add(["env0"], step(t, 1), latents)
            held = [vars(chunk) | (vars(chunk.context) if chunk.context else {}) for chunk in replay._chunks]
            arrays = [value for parts in held for value in parts.values() if isinstance(value, np.ndarray)]
            return sum(array.nbytes for array in arrays) / 256

        assert size((np.zeros((1, 32), np.uint8), np.zeros((1, 512), np.float32))) == 12_839 <= 13_000
        assert size(None) == 64 * 64 * 3 + 1 + 4 + 1

    def test_files_have_none_and_the_state_has_all(self, tmp_path):
        replay, plain = filled(70, contexts=True), filled(70)
        replay.save(tmp_path / "with")
        plain.save(tmp_path / "without")
        assert digest(tmp_path / "with") == digest(tmp_path / "without")
        refresh(replay, [("env0", 5), ("env1", 33)], 20)
        restored = Replay(replay.config)
        restored.load_state_dict(replay.state_dict(), tmp_path / "with")
        assert contexts(restored) == contexts(replay) and len(contexts(replay)) == 140
        for t in range(70, 120):
            for each in (replay, restored):
                each.add(["env0", "env1"], step(t, 2), state([0, 1], [t, t]))
        assert contexts(restored) == contexts(replay) and right(contexts(replay)) and len(contexts(replay)) == 240
        bare = Replay(replay.config)
        replay.save(tmp_path / "with")
        bare.load_state_dict(replay.state_dict(contexts=False), tmp_path / "with")
        assert len(bare) == len(replay) and not contexts(bare)
