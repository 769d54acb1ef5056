"""The best checkpoint on starts that no choice was made with, greedy and sampled apart; registers the model."""

import csv
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from dreamer.agent import Agent
from dreamer.checkpoint import build_agent
from dreamer.checkpoint import load as load_checkpoint
from dreamer.mario import make_env
from dreamer.rollout import Episode, Steps, play_episodes
from stages import bundle, card, lineage, tracking
from stages.interval import bootstrap_mean, wilson
from stages.params import load
from stages.paths import ACTIONS, BEST, EPISODES, EVALUATION, MODEL, PROVENANCE, REPORTS

MODES = ("sampled", "greedy")
COLUMNS = ("mode", "episode", "seed", "noops", "return", "best_x", "clear", "outcome", "length")


def summarize(episodes: list[Episode]) -> dict[str, Any]:
    """Rates and means with 95% intervals: Wilson's for the clear rate, the bootstrap's for the return."""
    clears = [episode for episode in episodes if episode.info["clear"]]
    returns = [episode.total_reward for episode in episodes]
    best_x = [episode.info["best_x"] for episode in episodes]
    rate_low, rate_high = wilson(len(clears), len(episodes))
    return_low, return_high = bootstrap_mean(returns)
    return {
        "episodes": len(episodes),
        "clear_rate": len(clears) / len(episodes),
        "clear_rate_low": rate_low,
        "clear_rate_high": rate_high,
        "return_mean": float(np.mean(returns)),
        "return_low": return_low,
        "return_high": return_high,
        "best_x_mean": float(np.mean(best_x)),
        "best_x_max": max(best_x),
        "length_mean": float(np.mean([episode.decisions for episode in episodes])),
        "decisions_to_flag": float(np.median([episode.decisions for episode in clears])) if clears else None,
    }


def play(
    agent: Agent, envs: Sequence[gymnasium.Env], seeds: Sequence[int], mode: str
) -> tuple[list[Episode], dict[int, dict[str, Any]]]:
    """An episode a seed, sampled or greedy, in the order of the seeds; and of each, by seed, the environment's
    `state_dict` at its end."""
    torch.manual_seed(seeds[0])
    played: dict[int, dict[str, Any]] = {}

    def record(seed: int, env: gymnasium.Env, steps: Steps) -> None:
        if steps.is_last[0]:
            played[seed] = env.state_dict()

    episodes = []
    with tqdm(total=len(seeds), desc=f"evaluate {mode}", unit="episode") as bar:
        for episode in play_episodes(envs, agent.policy(greedy=mode == "greedy"), seeds, record):
            episodes.append(episode)
            bar.update()
            bar.set_postfix(clears=sum(episode.info["clear"] for episode in episodes))
    return sorted(episodes, key=lambda episode: episode.seed), played


def main() -> None:
    params = load()
    state = load_checkpoint(BEST)
    agent = build_agent(state, params.compute, params.agent, BEST)
    seeds = [params.evaluate.seed + k for k in range(params.evaluate.episodes)]
    envs = [make_env(params.env.for_evaluation()) for _ in range(params.evaluate.envs)]
    provenance = json.loads(PROVENANCE.read_text())
    REPORTS.mkdir(exist_ok=True)
    with tracking.run("evaluate", params, {"data_sha256": provenance["data_sha256"]}) as run:
        rows, actions, results = [], {}, {}
        for mode in MODES:
            episodes, played = play(agent, envs, seeds, mode)
            results[mode] = summarize(episodes)
            actions[mode] = [{"seed": episode.seed, **played[episode.seed]} for episode in episodes]
            for k, episode in enumerate(episodes):
                rows.append(
                    (
                        *(
                            mode,
                            k,
                            episode.seed,
                            played[episode.seed]["noops"],
                            episode.total_reward,
                            episode.info["best_x"],
                        ),
                        *(int(episode.info["clear"]), episode.info["outcome"], episode.decisions),
                    )
                )
        results["checkpoint"] = {"frames": state["frames"], "score": state["score"]}
        EVALUATION.write_text(json.dumps(results, indent=1) + "\n")
        ACTIONS.write_text(json.dumps(actions) + "\n")
        with EPISODES.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        run.headline(_flat(results), state["frames"])
        origin = lineage.collect(params, provenance, results, run)
        with tempfile.TemporaryDirectory(prefix="mario-bundle-") as folder:
            text = card.write(origin, state["frames"])
            path = bundle.write(Path(folder) / "bundle", state, params.env.to_dict(), origin, text)
            model = run.log_model(path, params, results, lineage.tags(origin))
        MODEL.write_text(json.dumps(model, indent=1) + "\n")
        for path in (EVALUATION, EPISODES, ACTIONS):
            run.artifact(path, "evaluation")
    for mode in MODES:
        print(describe(mode, results[mode]))


def describe(mode: str, result: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"{mode}: clear rate {result['clear_rate']:.0%} "
        f"[{result['clear_rate_low']:.0%}, {result['clear_rate_high']:.0%}], "
        f"return {result['return_mean']:.0f} [{result['return_low']:.0f}, {result['return_high']:.0f}], "
        f"best x {result['best_x_max']} ({result['episodes']} episodes)"
    )


def _flat(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{mode}_{name}": float(value) for mode in MODES for name, value in results[mode].items() if value is not None
    }
