"""GIFs that show exactly what was evaluated."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from dreamer import checkpoint
from dreamer.agent import Agent
from dreamer.mario import ACTIONS, make_env
from dreamer.replay import Batch, Replay
from dreamer.rollout import RandomPolicy, Rollout, play_episodes
from stages import gif, open_loop, params, render

ROOT = Path(__file__).parents[1]
PARAMS = params.load(ROOT / "params.yaml")
TO_THE_RIGHT = (0.05, 0.1, 0.2, 0.1, 0.4, 0.1, 0.05)
COLUMNS = ("mode", "episode", "seed", "noops", "return", "best_x", "clear", "outcome", "length")


def decode(content: bytes) -> tuple[list[np.ndarray], list[int]]:
    """Frames and their delays in milliseconds."""
    with Image.open(io.BytesIO(content)) as image:
        frames, delays = [], []
        for frame in ImageSequence.Iterator(image):
            delays.append(frame.info["duration"])
            frames.append(np.asarray(frame.convert("RGB")))
        assert image.info["loop"] == 0
        return frames, delays


def screens(decisions: int) -> list[np.ndarray]:
    env = make_env(replace(PARAMS.env, time_limit=decisions))
    shown = []
    list(play_episodes([env], RandomPolicy(TO_THE_RIGHT, 1), [3], lambda seed, env, steps: shown.append(env.render())))
    env.close()
    return shown


def test_a_gif_of_the_game_has_every_frame_in_its_exact_colours():
    shown = screens(60)
    shown.insert(30, shown[29])  # nothing changes for once
    content = gif.encode(iter(shown), 20)
    frames, delays = decode(content)
    assert len(frames) == len(shown) > 50
    assert all(np.array_equal(*pair) for pair in zip(frames, shown, strict=True))
    assert set(delays) == {50}
    assert len(content) < 0.8 * sum(len(gif.encode([frame], 20)) for frame in shown)


@pytest.mark.parametrize(("fps", "first"), [(15, [70, 70, 60, 70, 70, 60]), (12, [90, 80, 80, 90]), (50, [20, 20])])
def test_delays_average_to_the_asked_rate(fps, first):
    frames = [np.full((8, 8, 3), i, np.uint8) for i in range(120)]
    _, delays = decode(gif.encode(frames, fps))
    assert delays[: len(first)] == first
    assert sum(delays) == pytest.approx(1000 * 120 / fps, abs=10)


def test_a_frame_of_many_colours_stays_close_and_the_next_of_few_is_exact():
    y, x = np.mgrid[0:64, 0:64].astype(np.uint8)
    many, few = np.stack([4 * x, 4 * y, 2 * (x + y)], -1), np.stack([x // 8, y // 8, 0 * x], -1)
    few[:32] = many[:32] // 128  # some of it as it was
    frames, _ = decode(gif.encode([few, many, many + np.uint8(1), few], 10))
    assert np.array_equal(frames[0], few)
    assert np.abs(frames[1].astype(int) - many).mean() < 8
    assert np.abs(frames[2].astype(int) - frames[1]).mean() < 1
    assert np.array_equal(frames[3], few)


def test_256_colours_are_exact_and_a_missing_or_odd_frame_is_refused(tmp_path):
    full = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    changed = full.copy()
    changed[3, 3] = 0
    frames, _ = decode(gif.encode([full, changed], 5))
    assert np.array_equal(np.stack(frames), np.stack([full, changed]))
    with pytest.raises(ValueError, match="at least one frame"):
        gif.encode([], 5)
    with pytest.raises(ValueError, match="shape"):
        gif.write(tmp_path / "odd.gif", [full, full[1:]], 5)
    with pytest.raises(ValueError, match="1 to 50"):
        gif.encode([full], 60)
    assert list(tmp_path.iterdir()) == []


def replay_of(decisions: int) -> Replay:
    env = make_env(PARAMS.env)
    replay, rollout = Replay(PARAMS.replay), Rollout([env], RandomPolicy([1] * 7, 0), lambda k: k)
    for _ in range(decisions):
        replay.add(["seed0"], rollout.step()[0])
    rollout.stop()
    env.close()
    return replay


def test_sequences_lie_within_one_episode_where_they_can():
    replay = replay_of(500)
    batch = open_loop.sample_sequences(replay, 4, 40, np.random.default_rng(0))
    assert batch.obs.shape == (4, 40, 64, 64, 3)
    assert not batch.is_first[:, 1:].any()
    again = open_loop.sample_sequences(replay, 4, 40, np.random.default_rng(0))
    assert np.array_equal(batch.obs, again.obs)
    short = open_loop.sample_sequences(replay, 2, 2000, np.random.default_rng(0))
    assert short.obs.shape[:2] == (2, 500)


def test_the_open_loop_picture_shows_truth_model_and_error():
    rng = np.random.default_rng(0)
    truth, model = rng.integers(256, size=(2, 2, 6, 64, 64, 3), dtype=np.uint8)
    frames = list(open_loop.frames(truth, model, context=2))
    assert len(frames) == 6
    size, step = 64 * open_loop.SCALE, 64 * open_loop.SCALE + 2 * open_loop.GAP
    left, top = open_loop.GAP, open_loop.HEADER + open_loop.GAP
    for row in range(2):
        for column, wanted in enumerate((truth, model, np.abs(truth.astype(int) - model).max(-1, keepdims=True))):
            y, x = top + row * step, left + column * step
            found = frames[4][y : y + size : open_loop.SCALE, x : x + size : open_loop.SCALE]
            assert np.array_equal(found, np.broadcast_to(wanted[row, 4], found.shape))
    edge = [tuple(frame[top + 50, left + step - 1]) for frame in frames]
    assert edge == [open_loop.SEEN] * 2 + [open_loop.IMAGINED] * 4


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A working directory with all that the stage needs: real episodes, replay, an agent that has learned nothing."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copy(ROOT / "params.yaml", root)
    (root / "reports").mkdir()
    seeds = [PARAMS.evaluate.seed + k for k in range(3)]
    env, rows, actions = make_env(replace(PARAMS.env, stall_limit=0)), [], {}
    for mode, policy_seed in (("sampled", 1), ("greedy", 2)):
        states = {}

        def keep(seed, env, steps, states=states):
            states[seed] = env.state_dict()

        episodes = list(play_episodes([env], RandomPolicy(TO_THE_RIGHT, policy_seed), seeds, keep))
        actions[mode] = [{"seed": seed, **states[seed]} for seed in seeds]
        for k, episode in enumerate(episodes):
            info = episode.info
            rows.append(
                (
                    *(mode, k, seeds[k], states[seeds[k]]["noops"], episode.total_reward),
                    *(info["best_x"], int(info["clear"]), info["outcome"], episode.decisions),
                )
            )
    env.close()
    (root / "reports/actions.json").write_text(json.dumps(actions))
    with (root / "reports/episodes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    replay_of(400).save(root / "data/seed", partial=True)
    torch.manual_seed(0)
    for name in ("best", "snapshot-000", "snapshot-100"):
        agent = Agent(PARAMS.agent, PARAMS.compute, len(ACTIONS))
        checkpoint.save(root / f"checkpoints/{name}.pt", {**checkpoint.agent_state(agent), "frames": 0, "score": 0.0})
    return root


def test_the_stage_shows_the_best_episode_of_each_mode_as_it_was(evaluated, monkeypatch):
    monkeypatch.chdir(evaluated)
    render.render_all(params.load())
    rows = render.read_episodes(render.EPISODES)
    index = json.loads((render.GIFS / "index.json").read_text())
    assert [entry["kind"] for entry in index] == ["episode", "episode", "learning", "open_loop"]
    assert {entry["file"] for entry in index} == {path.name for path in render.GIFS.glob("*.gif")}
    env = make_env(replace(PARAMS.env, stall_limit=0))
    recorded = json.loads(render.RECORDING.read_text())
    for mode, entry in zip(("sampled", "greedy"), index, strict=False):
        top = max((row for row in rows if row["mode"] == mode), key=lambda row: row["return"])
        assert {key: entry[key] for key in render.INDEXED} == {key: top[key] for key in render.INDEXED}
        frames, delays = decode((render.GIFS / entry["file"]).read_bytes())
        assert len(frames) == top["length"] + 1
        assert sum(delays) == 1000 * len(frames) / PARAMS.render.fps
        env.load_state_dict(next(episode for episode in recorded[mode] if episode["seed"] == top["seed"]))
        assert np.array_equal(frames[-1], env.render())
    env.close()
    before = {path.name: path.read_bytes() for path in render.GIFS.iterdir()}
    render.render_all(params.load())
    assert {path.name: path.read_bytes() for path in render.GIFS.iterdir()} == before


@pytest.mark.parametrize("tampering", ["an action", "the end", "a button that is none", "an episode"])
def test_actions_that_do_not_lead_to_the_evaluated_result_are_refused(evaluated, tmp_path, monkeypatch, tampering):
    root = shutil.copytree(evaluated, tmp_path / "copy")
    monkeypatch.chdir(root)
    (top,) = render.best(render.read_episodes(render.EPISODES), "sampled", 1)
    recorded = json.loads(render.RECORDING.read_text())
    episode = next(episode for episode in recorded["sampled"] if episode["seed"] == top["seed"])
    if tampering == "an action":
        episode["actions"][: len(episode["actions"]) // 2] = [6] * (len(episode["actions"]) // 2)
    elif tampering == "the end":
        del episode["actions"][len(episode["actions"]) // 2 :]
    elif tampering == "a button that is none":
        episode["actions"][0] = 7
    else:
        recorded["sampled"].remove(episode)
    render.RECORDING.write_text(json.dumps(recorded))
    with pytest.raises(render.RenderError, match=f"sampled episode of seed {top['seed']}.*dvc repro --force evaluate"):
        render.render_all(params.load())
    assert not list(render.GIFS.glob("sampled*"))


def test_what_was_learned_when_is_shown_on_the_best_episode(evaluated, monkeypatch):
    """Columns: the truth, then each snapshot's own prediction of it; the first rows are the episode's start."""
    monkeypatch.chdir(evaluated)
    render.render_all(params.load())
    (top,) = render.best(render.read_episodes(render.EPISODES), "sampled", 1)
    recorded = json.loads(render.RECORDING.read_text())["sampled"]
    episode = next(episode for episode in recorded if episode["seed"] == top["seed"])
    env = make_env(replace(PARAMS.env, stall_limit=0))
    seen = [env.reset(options={"noops": episode["noops"]})[0]]
    seen += [env.step(action)[0] for action in episode["actions"]]
    env.close()
    frames, _ = decode((render.GIFS / "learning.gif").read_bytes())
    length = min(PARAMS.render.context + render.IMAGINED_STEPS, len(seen))
    assert len(frames) == length
    scale, top_of = open_loop.SMALL, open_loop.HEADER + open_loop.GAP
    size = 64 * scale
    lefts = [open_loop.GAP + i * (size + 2 * open_loop.GAP) for i in range(3)]
    for t in (0, length - 1):
        truth, *models = (frames[t][top_of : top_of + size, x : x + size] for x in lefts)
        assert np.abs(truth[::scale, ::scale].astype(int) - seen[t]).mean() < 4  # 256 colours
        assert all(np.abs(model.astype(int) - truth).mean() > 10 for model in models)
        assert np.abs(models[0].astype(int) - models[1]).mean() > 0.1


def test_windows_cover_an_episode_evenly_and_a_short_one_once():
    steps = 120
    batch = Batch(
        obs=np.zeros((1, steps, 2, 2, 3), np.uint8),
        action=np.arange(steps)[None],
        **{name: np.zeros((1, steps)) for name in ("reward", "is_first", "is_last", "is_terminal")},
    )
    found = open_loop.windows(batch, 3, 50).action
    assert found[:, 0].tolist() == [0, 35, 70] and found.shape == (3, 50) and found[-1, -1] == steps - 1
    assert open_loop.windows(batch, 3, 500).action.tolist() == [list(range(steps))]


def test_clears_come_before_higher_returns():
    rows = [
        {"mode": "sampled", "clear": clear, "return": value, "seed": seed}
        for seed, (clear, value) in enumerate([(0, 900.0), (1, 100.0), (0, 950.0), (1, 200.0)])
    ]
    assert [row["seed"] for row in render.best([*rows, {**rows[1], "mode": "greedy"}], "sampled", 3)] == [3, 1, 2]
