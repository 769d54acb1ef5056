"""Challenger and champion on the same held-out starts: what `mario promote` decides by. Not a stage.

Both play sampled, as they learned to: greedy play from one start is a single path, and tells less.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamer.checkpoint import CheckpointError
from dreamer.config import ComputeConfig
from stages.address import TrackingError
from stages.agents import load_agent
from stages.bundle import BundleError, read_config
from stages.params import Params, PromoteParams, load


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare", description="Challenger and champion from the same starts.")
    parser.add_argument("challenger", metavar="VERSION")
    parser.add_argument("champion", nargs="?", metavar="VERSION")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result as JSON")
    parser.add_argument("--automatic", action="store_true", help="only if promote.automatic says so")
    parser.add_argument("--force", action="store_true", help="go on without a champion that is damaged")
    return parser.parse_args(argv)


def main() -> None:
    args, params = arguments(), load()
    if args.automatic and not params.promote.automatic:
        result = {"status": "OFF", "reasons": ["promote.automatic is false in params.yaml"]}
    else:
        result = verdict(args.challenger, args.champion, params, args.force)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def verdict(challenger: str, champion: str | None, params: Params, force: bool) -> dict[str, Any]:
    """status (PASS, FAIL, ERROR), reasons, and the numbers behind them."""
    from stages import tracking

    rule = params.promote
    known: dict[str, Any] = {"rule": rule.to_dict(), "game": params.env.for_evaluation().to_dict()}
    lost: list[str] = []
    try:
        paths = {"challenger": tracking.fetch(challenger, fresh=True)}
        if champion is not None:
            try:
                paths["champion"] = tracking.fetch(champion, fresh=True)
            except (BundleError, TrackingError) as error:  # damaged, or deleted
                if not force:
                    raise type(error)(f"the champion cannot be compared with (mario rollback): {error}") from None
                lost = [f"the champion cannot be compared with: {error}"]
        weights = {who: read_config(path)["weights_sha256"] for who, path in paths.items()}
        known["weights_sha256"] = weights
        if len(weights) == 2 and len(set(weights.values())) == 1:
            return {**known, "status": "FAIL", "reasons": ["it has the champion's weights, bit by bit"], "test": None}
        episodes = play(paths, params, rule)
    except (BundleError, CheckpointError) as error:
        return {**known, "status": "ERROR", "reasons": [" ".join(str(error).split())], "test": None}
    from stages.gate import judge
    from stages.play import summarize

    results = {who: {**summarize(rows), "episodes": rows} for who, rows in episodes.items()}
    judged = judge(episodes["challenger"], episodes.get("champion"), rule)
    return {**known, **judged, "reasons": [*lost, *judged["reasons"]], "results": results}


def play(paths: dict[str, Path], params: Params, rule: PromoteParams) -> dict[str, list[dict[str, Any]]]:
    """Of each agent the episodes, in the order of their starts."""
    import torch
    from tqdm import tqdm

    from dreamer.mario import make_env
    from dreamer.rollout import play_episodes

    compute = ComputeConfig.from_dict({**params.compute.to_dict(), "compile": False})
    agents = {who: load_agent(path, compute) for who, path in paths.items()}
    seeds = range(rule.seed, rule.seed + rule.episodes)
    envs = [make_env(params.env.for_evaluation()) for _ in range(rule.envs)]
    played = {}
    with tqdm(total=len(agents) * rule.episodes, unit="episode") as bar:
        for who, agent in agents.items():
            bar.set_description(who)
            torch.manual_seed(rule.seed)
            rows = []
            for episode in play_episodes(envs, agent.policy(greedy=False), seeds):
                rows.append(
                    {
                        "seed": episode.seed,
                        "clear": bool(episode.info["clear"]),
                        "return": float(episode.total_reward),
                        "best_x": int(episode.info["best_x"]),
                        "decisions": episode.decisions,
                        "outcome": episode.info["outcome"],
                    }
                )
                bar.update()
                bar.set_postfix(clears=sum(row["clear"] for row in rows))
            played[who] = sorted(rows, key=lambda row: row["seed"])
    return played
