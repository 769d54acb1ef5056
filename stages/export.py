"""`python -m stages export NAME`: best.pt as the agent that ships with the repository, in pretrained/. Not a stage.

What is told of it is measured with what is shipped: weights of 16 bits, played in float32.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dreamer import checkpoint
from dreamer.config import ComputeConfig, EnvConfig
from dreamer.mario import make_env
from stages import bundle, card, lineage
from stages.agents import load_agent
from stages.bundle import BundleError
from stages.evaluate import MODES, describe, play, summarize
from stages.events import NoEvents
from stages.params import load
from stages.paths import BEST, PROVENANCE, ROOT, TRAINING
from stages.record import Run

DIRECTORY = ROOT / "pretrained"
LIMIT = 10_000_000  # bytes of weights that a repository may be asked to carry


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export", description="The best checkpoint as the agent that ships.")
    parser.add_argument("name", help="of the training run, whose curves go to curves/NAME")
    parser.add_argument("--episodes", type=int, default=200, metavar="N", help="held-out; default: %(default)s")
    parser.add_argument("--seed", type=int, default=400_000, metavar="N", help="of their starts; default: %(default)s")
    parser.add_argument("--note", metavar="TEXT", help="for the card: what the parameters do not tell of its training")
    parser.add_argument("--to", type=Path, default=DIRECTORY, metavar="DIR", help="default: pretrained/")
    return parser.parse_args(argv)


def main() -> None:
    args, params = arguments(), load()
    state, trained = checkpoint.load(BEST), json.loads(PROVENANCE.read_text())
    game = EnvConfig.from_dict(trained["params"]["env"])
    with tempfile.TemporaryDirectory(prefix="mario-export-") as folder:
        made = bundle.write(Path(folder) / "bundle", state, game.to_dict(), half=True)
        if (size := (made / bundle.WEIGHTS).stat().st_size) > LIMIT:
            raise BundleError(
                f"{BEST}: {size / 1e6:.1f} MB of weights, at most {LIMIT / 1e6:.0f} ship; train smaller ones"
            )
        agent = load_agent(made, ComputeConfig(device="auto", precision="float32", compile=False))
        envs = [make_env(game.for_evaluation()) for _ in range(params.evaluate.envs)]
        results = {}
        for mode in MODES:
            episodes, _ = play(agent, envs, range(args.seed, args.seed + args.episodes), mode)
            results[mode] = summarize(episodes) | {
                "failures": [
                    {"seed": each.seed, "outcome": each.info["outcome"], "best_x": each.info["best_x"]}
                    for each in episodes
                    if not each.info["clear"]
                ]
            }
            print(describe(mode, results[mode]))
        origin = lineage.collect(params, trained, results, Run({}, NoEvents()))
        origin["training"] = json.loads((TRAINING / "summary.json").read_text())
        origin["note"] = args.note
        text = card.write(origin, state["frames"])
        bundle.write(made, state, game.to_dict(), origin, text, half=True)
        args.to.mkdir(parents=True, exist_ok=True)
        for path in made.iterdir():
            shutil.copyfile(path, args.to / path.name)
    curves = args.to / "curves" / args.name
    curves.mkdir(parents=True, exist_ok=True)
    for name in ("episodes.csv", "evaluations.csv"):
        shutil.copyfile(TRAINING / name, curves / name)
    print(f"written to {args.to}")
