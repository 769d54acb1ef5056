"""Lets a trained agent play: episodes on the terminal, as JSON or as GIFs. Not a stage, it changes no result.

Played as evaluated, so a stall ends no episode; from starts of its own choice, on any level. A model of the registry
or of a bundle's directory knows the game it was trained for; a checkpoint file plays that of params.yaml.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from dreamer.config import ComputeConfig, ConfigError, EnvConfig
from stages import bundle
from stages.params import PATH, Params, load
from stages.paths import CHECKPOINTS

DIRECTORY = Path("play")
COLUMNS = "episode  seed    outcome     return   best x  decisions"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mario play", description="A trained agent plays.")
    parser.add_argument(
        "--model",
        default=str(CHECKPOINTS),
        metavar="WHICH",
        help="a registered model's version or alias (3, challenger, champion), the directory of a downloaded one, a "
        "checkpoint file, or a directory with best.pt and latest.pt; default: %(default)s/",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--use-best", dest="file", action="store_const", const="best.pt", help="of a directory (default)"
    )
    which.add_argument("--use-latest", dest="file", action="store_const", const="latest.pt", help="of a directory")
    parser.add_argument("--episodes", type=_number(1), default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--deterministic", "--action-mode", action="store_true", help="most likely actions instead of sampled ones"
    )
    parser.add_argument("--save-gif", action="store_true", help="save each episode as an animation")
    parser.add_argument(
        "--gif-fps", type=_number(1, 50), default=20, metavar="N", help="default: %(default)s; a decision is a frame"
    )
    parser.add_argument("--gif-dir", type=Path, default=DIRECTORY, metavar="DIR", help="default: %(default)s/")
    parser.add_argument("--level", metavar="W-S", help='"1-1" to "8-4"; default: the one it was trained for')
    parser.add_argument(
        "--seed",
        type=_number(0),
        default=0,
        metavar="N",
        help="of the first start and of sampling; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output, nothing else")
    parser.add_argument(
        "--web", action="store_true", help="play live in a browser, with the model's dream beside the game"
    )
    parser.add_argument(
        "--port", type=_number(0, 65535), default=8765, metavar="N", help="of --web; 0: any; default: %(default)s"
    )
    parser.add_argument("--open", action="store_true", help="with --web: open the browser, too")
    args = parser.parse_args(argv)
    if args.web and (args.json or args.save_gif):
        parser.error("--web shows its episodes in the browser: leave out --json and --save-gif")
    return args


def _number(low: int, high: int | None = None):
    def number(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"must be {low} to {high}" if high is not None else f"must be at least {low}"
            )
        return value

    return number


def main() -> None:
    args = arguments()
    params = load() if PATH.exists() or Path(args.model) == CHECKPOINTS else None
    if params:
        game(params.env, args.level)  # what is wrong in it, before what takes seconds
    if args.web:
        return live(args, params)
    path = find(args.model, args.file)
    env_config, compute = settings(path, params, args.level)

    import torch  # late, as it takes seconds: --help and what is wrong in params.yaml are told at once
    from tqdm import tqdm

    from dreamer.mario import make_env
    from dreamer.rollout import play_episodes
    from stages.agents import load_agent

    agent = load_agent(path, compute)
    torch.manual_seed(args.seed)
    seeds = range(args.seed, args.seed + args.episodes)
    envs = [make_env(env_config) for _ in range(min(2, args.episodes))]
    mode = "greedy" if args.deterministic else "sampled"
    filming = Cameras(args.gif_dir, args.gif_fps, f"{env_config.level}-{mode}") if args.save_gif else nullcontext()
    rows = []
    with filming as cameras, tqdm(total=args.episodes, desc="play", unit="episode", leave=False, delay=5) as bar:
        if not args.json:
            bar.write(f"{path}, level {env_config.level}, {mode} play\n{COLUMNS}")
        for episode in play_episodes(envs, agent.policy(args.deterministic), seeds, cameras):
            rows.append(
                {
                    "seed": episode.seed,
                    "outcome": episode.info["outcome"],
                    "clear": episode.info["clear"],
                    "return": episode.total_reward,
                    "best_x": episode.info["best_x"],
                    "decisions": episode.decisions,
                    "gif": str(cameras.path(episode.seed)) if cameras else None,
                }
            )
            if not args.json:
                bar.write(describe(len(rows), rows[-1]))
            bar.update()
    rows.sort(key=lambda row: row["seed"])
    summary = summarize(rows)
    if args.json:
        about = {
            "checkpoint": str(path),
            "level": env_config.level,
            "deterministic": args.deterministic,
            "seed": args.seed,
        }
        print(json.dumps({**about, **summary, "episodes": rows}, indent=1))
        return
    print(
        f"clear rate {summary['clear_rate']:.0%} [{summary['clear_rate_low']:.0%}, {summary['clear_rate_high']:.0%}], "
        f"mean return {summary['return_mean']:.0f} ({len(rows)} episodes)"
    )
    if cameras:
        print(f"animations in {args.gif_dir}/")


def settings(path: Path, params: Params | None, level: str | None) -> tuple[EnvConfig, ComputeConfig]:
    """The game that a model plays, and what computes it.

    Raises:
        ConfigError: there is no such level, or neither the model nor params.yaml tells the game
    """
    env = EnvConfig.from_dict(bundle.read_config(path)["env"]) if path.is_dir() else (params or load()).env
    compute = params.compute.to_dict() if params else {"device": "auto", "precision": "float32"}
    return game(env, level), ComputeConfig.from_dict({**compute, "compile": False})  # takes longer than it saves here


def live(args: argparse.Namespace, params: Params | None) -> None:
    """Plays in a browser instead. On a CPU in float32 and one thread, the fastest for one game."""
    from stages.live import server

    with server.bind(args.port) as listening:
        import torch

        from dreamer.agent import pick_device
        from dreamer.mario import make_env
        from stages.live import models
        from stages.live.session import Session

        env, compute = settings(find(args.model, args.file), params, args.level)
        if pick_device(compute.device).type == "cpu":
            torch.set_num_threads(1)
            compute = replace(compute, precision="float32")
        session = Session(
            models.loader(find, compute),
            lambda level: make_env(game(env, level)),
            model=args.model if args.file is None else str(Path(args.model) / args.file),
            level=env.level,
            seed=args.seed,
            greedy=args.deterministic,
        )
        server.serve(session, lambda: models.known(args.model), listening, args.open)


def game(env: EnvConfig, level: str | None) -> EnvConfig:
    """The game as evaluated, on another level if one is given.

    Raises:
        ConfigError: there is no such level
    """
    try:
        return EnvConfig.from_dict({**env.to_dict(), **({"level": level} if level else {})}).for_evaluation()
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None


def find(model: str, file: str | None) -> Path:
    """The checkpoint, or the bundle's directory, that `--model` means; `file` is best.pt, latest.pt or not given.

    Raises:
        CheckpointError: `file` is given for what has no such file
        TrackingError: the registry has no such version or alias, or cannot be reached
        BundleError: the registered model's files are not those that were registered
    """
    path = Path(model)
    found = bundle.find(path)
    if found is None and (path.is_dir() or path == CHECKPOINTS):
        return path / (file or "best.pt")
    if file:
        from dreamer.checkpoint import CheckpointError

        raise CheckpointError(f"--model {model}: no directory with checkpoints, so there is no {file} in it to use")
    if found or path.exists() or "/" in model or model.endswith(".pt"):
        return found or path
    from stages import tracking

    return tracking.fetch(model)


class Cameras:
    """Films episodes that are played side by side, a frame a decision. Called as `on_step` of `play_episodes`.

    A context: an episode that an error or Ctrl-C ends leaves no file.
    """

    def __init__(self, directory: Path, fps: int, label: str):
        self.directory, self.fps, self.label = directory, fps, label
        directory.mkdir(parents=True, exist_ok=True)
        self._running: dict[int, tuple[AbstractContextManager, Any]] = {}  # of each seed: its file and what writes it

    def path(self, seed: int) -> Path:
        return self.directory / f"{self.label}-seed{seed}.gif"

    def __call__(self, seed: int, env: Any, steps: Any) -> None:
        if seed not in self._running:
            from stages import gif

            file = gif.create(self.path(seed), self.fps)
            self._running[seed] = file, file.__enter__()
        file, writer = self._running[seed]
        writer.add(env.render())
        if steps.is_last[0]:
            del self._running[seed]
            file.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        for file, _ in self._running.values():
            file.__exit__(*error)


def describe(number: int, row: dict[str, Any]) -> str:
    """A line below `COLUMNS`."""
    played = f"{row['return']:>6.0f}   {row['best_x']:>6}  {row['decisions']:>9}"
    return f"{number:>7}  {row['seed']:<6}  {row['outcome']:<10}  {played}"


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Clear rate and mean return, with 95% intervals."""
    from stages.interval import bootstrap_mean, wilson

    clears, returns = sum(row["clear"] for row in rows), [row["return"] for row in rows]
    rate_low, rate_high = wilson(clears, len(rows))
    return_low, return_high = bootstrap_mean(returns)
    return {
        "clear_rate": clears / len(rows),
        "clear_rate_low": rate_low,
        "clear_rate_high": rate_high,
        "return_mean": sum(returns) / len(returns),
        "return_low": return_low,
        "return_high": return_high,
    }
