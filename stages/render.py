"""The best evaluated episodes, played again from their recorded actions, and the world model's imagination, as GIFs."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from dreamer.checkpoint import load_agent
from dreamer.mario import ACTIONS, make_env
from dreamer.replay import Batch, Replay, digest
from dreamer.rollout import RecordedPolicy, Steps, play_episodes
from stages import gif, open_loop, tracking
from stages.params import Params, load
from stages.paths import ACTIONS as RECORDING
from stages.paths import BEST, CHECKPOINTS, EPISODES, GIFS, REPLAY, SEED_DATA, SNAPSHOTS

INDEXED = ("mode", "seed", "return", "best_x", "clear", "outcome", "length")
IMAGINED_STEPS, OPEN_LOOP_FPS = 45, 10


class RenderError(ValueError):
    """The recorded actions do not lead to the evaluated results. The message names the episode and the remedy."""


def read_episodes(path: Path) -> list[dict[str, Any]]:
    """The rows of episodes.csv with their types."""
    kinds = {"episode": int, "seed": int, "noops": int, "return": float, "best_x": int, "clear": int, "length": int}
    with path.open(newline="") as file:
        return [{key: kinds.get(key, str)(value) for key, value in row.items()} for row in csv.DictReader(file)]


def best(rows: list[dict[str, Any]], mode: str, count: int) -> list[dict[str, Any]]:
    """Of one mode: clears first, then by return."""
    of_mode = [row for row in rows if row["mode"] == mode]
    return sorted(of_mode, key=lambda row: (row["clear"], row["return"]), reverse=True)[:count]


def play_again(
    path: Path, env: gymnasium.Env, row: dict[str, Any], recorded: list[dict[str, Any]], fps: int, bar: tqdm
) -> Batch:
    """One episode's screens into a GIF, a frame a decision and one for the start. Returns what the agent saw, (1, T).

    Raises:
        RenderError: it does not come out as in `row`
    """
    name = f"{row['mode']} episode of seed {row['seed']}"
    remedy = "evaluate again: dvc repro --force evaluate"
    actions = next((episode["actions"] for episode in recorded if episode["seed"] == row["seed"]), None)
    if actions is None:
        raise RenderError(f"{RECORDING}: lacks the {name}, which {EPISODES} has; {remedy}")
    if not set(actions) <= set(range(len(ACTIONS))):
        raise RenderError(f"{RECORDING}: the {name} has an action out of 0..{len(ACTIONS) - 1}; {remedy}")
    seen: list[Steps] = []
    with gif.create(path, fps) as writer:

        def draw(seed: int, env: gymnasium.Env, steps: Steps) -> None:
            writer.add(env.render())
            seen.append(steps.copy())
            bar.update()

        (episode,) = play_episodes([env], RecordedPolicy([actions]), [row["seed"]], draw)
        now = {"return": episode.total_reward, "best_x": episode.info["best_x"], "length": episode.decisions}
        for key, value in now.items():
            if not math.isclose(value, row[key], rel_tol=1e-5, abs_tol=1e-2):
                raise RenderError(f"{RECORDING}: the {name} ends with {key} {value}, evaluated {row[key]}; {remedy}")
    return Batch(**{name: np.stack([getattr(steps, name) for steps in seen], 1) for name in vars(seen[0])})


def learn(path: Path, params: Params, episode: Batch, bar: tqdm) -> int:
    """What the model imagined of one episode, (1, T), at each quarter of its training, into a GIF. Returns how many
    steps it has."""
    context = params.render.context
    batch = open_loop.windows(episode, params.render.sequences, context + IMAGINED_STEPS)
    models = {}
    for path_of_weights in sorted(CHECKPOINTS.glob(SNAPSHOTS.replace("{:03}", "*"))):
        torch.manual_seed(params.seed)
        agent = load_agent(path_of_weights, replace(params.compute, compile=False))
        models[int(path_of_weights.stem[-3:])] = agent.open_loop(batch, context)
    with gif.create(path, OPEN_LOOP_FPS) as writer:
        for frame in open_loop.learning_frames(batch.obs, models, context):
            writer.add(frame)
            bar.update()
    return batch.obs.shape[1]


def imagine(path: Path, params: Params, replay: Replay, bar: tqdm) -> int:
    """The open-loop prediction of replayed sequences into a GIF. Returns how many steps it has."""
    context = params.render.context
    agent = load_agent(BEST, replace(params.compute, compile=False))  # which takes longer than it saves here
    rng = np.random.default_rng(params.seed)
    batch = open_loop.sample_sequences(replay, params.render.sequences, context + IMAGINED_STEPS, rng)
    torch.manual_seed(params.seed)
    with gif.create(path, OPEN_LOOP_FPS) as writer:
        for frame in open_loop.frames(batch.obs, agent.open_loop(batch, context), context):
            writer.add(frame)
            bar.update()
    return batch.obs.shape[1]


def render_all(params: Params) -> None:
    """Writes the films of the best episodes and the open-loop prediction, and their index."""
    render = params.render
    rows, recorded = read_episodes(EPISODES), json.loads(RECORDING.read_text())
    chosen = [row for mode in ("sampled", "greedy") for row in best(rows, mode, render.episodes)]
    replay = Replay(params.replay)
    replay.load(SEED_DATA)
    if any(REPLAY.glob("*.npz")):  # training may have ended with the seed data
        replay.load(REPLAY)
    GIFS.mkdir(parents=True, exist_ok=True)
    for old in GIFS.glob("*.gif"):
        old.unlink()
    env = make_env(params.env.for_evaluation())
    index = []
    total = sum(row["length"] + 1 for row in chosen) + 2 * (render.context + IMAGINED_STEPS)
    with tqdm(total=total, desc="render", unit="frame") as bar:
        episodes = []
        for row in chosen:
            path = GIFS / f"{row['mode']}-{row['seed']}.gif"
            episodes.append(play_again(path, env, row, recorded[row["mode"]], render.fps, bar))
            index.append({"file": path.name, "kind": "episode", **{key: row[key] for key in INDEXED}})
        path = GIFS / "learning.gif"
        steps = learn(path, params, episodes[0], bar)
        index.append({"file": path.name, "kind": "learning", **dict.fromkeys(INDEXED), "length": steps})
        path = GIFS / "open_loop.gif"
        steps = imagine(path, params, replay, bar)
        index.append({"file": path.name, "kind": "open_loop", **dict.fromkeys(INDEXED), "length": steps})
    env.close()
    (GIFS / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def main() -> None:
    params = load()
    with tracking.run("render", params, {"data_sha256": digest(SEED_DATA)}) as run:
        render_all(params)
        run.artifact(GIFS, "gifs")
