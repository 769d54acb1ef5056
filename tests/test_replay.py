"""Replay: what goes in comes out, in memory and on disk, and damage is noticed."""

import numpy as np
import pytest

from dreamer.config import ReplayConfig
from dreamer.replay import ChunkError, Replay, digest
from dreamer.rollout import NO_ACTION, Steps

EPISODE = 13  # steps


def step(t: int, streams: int) -> Steps:
    """The image of step t of stream i is filled with t, and i in the last channel."""
    obs = np.full((streams, 64, 64, 3), t % 256, np.uint8)
    obs[..., 2] = np.arange(streams)[:, None, None]
    first, last = np.full(streams, t % EPISODE == 0), np.full(streams, t % EPISODE == EPISODE - 1)
    action = np.where(first, NO_ACTION, t % 7)
    return Steps(obs, action, np.full(streams, t, np.float32), first, last, last & (t % 2 == 0))


def filled(steps: int, streams: int = 2, capacity: int = 10_000, chunk_length: int = 16) -> Replay:
    replay = Replay(ReplayConfig(capacity, chunk_length))
    for t in range(steps):
        replay.add([f"env{i}" for i in range(streams)], step(t, streams))
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
            for name in ("obs", "action", "reward", "is_first", "is_last", "is_terminal"):
                assert (getattr(batch, name)[b, k] == getattr(expected, name)[stream]).all(), (name, t0, k)
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
            Replay(ReplayConfig(100, 16)).load(tmp_path)
        assert str(path) in str(error.value) and "dvc checkout" in str(error.value) and "\n" not in str(error.value)

    def test_a_foreign_file_is_named(self, tmp_path):
        filled(50).save(tmp_path)
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(ChunkError, match=r"notes\.txt: not a replay chunk"):
            Replay(ReplayConfig(100, 16)).load(tmp_path)

    def test_an_empty_directory_is_an_error(self, tmp_path):
        with pytest.raises(ChunkError, match="holds no replay chunks"):
            Replay(ReplayConfig(100, 16)).load(tmp_path)

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
        assert all((getattr(one, name) == getattr(two, name)).all() for name in ("obs", "action", "reward", "is_first"))
        check(restored, 20)

    def test_a_missing_chunk_of_a_checkpoint_is_named(self, tmp_path):
        replay = filled(70)
        replay.save(tmp_path)
        state = replay.state_dict()
        (tmp_path / state["files"][2]).unlink()
        with pytest.raises(ChunkError, match=f"{state['files'][2]}: missing"):
            Replay(replay.config).load_state_dict(state, tmp_path)
