"""World model and actor-critic, learned from replay while collecting goes on.

Interrupted at any moment, it goes on from its last checkpoint when it is run again with the same inputs.
"""

import itertools
import json
import time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dreamer import checkpoint
from dreamer.agent import Agent
from dreamer.archive import Archive
from dreamer.mario import ACTIONS, make_env, rom_sha256
from dreamer.replay import Replay, digest
from dreamer.rollout import Episode, Rollout, Steps, episode_seeds, play_episodes
from dreamer.team import Team
from dreamer.training import Counters, Progress, Training
from stages import git, open_loop, provenance, tracking
from stages.allocator import give_back_holes, keep_freed_memory
from stages.curves import Curve
from stages.digest import dvc_md5
from stages.interrupt import Interrupt, graceful
from stages.params import Params, load
from stages.paths import ARCHIVE, CHECKPOINTS, REPLAY, SEED_DATA, SNAPSHOTS, TRAINING
from stages.progress import Progress as Work
from stages.progress import fingerprint, publish
from stages.watch import Watch

QUARTERS = (0, 25, 50, 100)  # percent of training after which the weights are kept, to see what was learned when
VIDEO_STEPS = 50  # decisions of the open-loop prediction
VIDEO_LIMIT = 600  # decisions of an evaluation's video

LOSSES = (
    *("model_loss", "image_loss", "reward_loss", "continue_loss", "kl_loss", "kl_divergence", "prior_entropy"),
    *("posterior_entropy", "model_grad_norm", "actor_loss", "policy_entropy", "return_scale", "advantage_magnitude"),
    *("actor_grad_norm", "value_loss", "critic_grad_norm", "imag_reward", "imag_return", "imag_value"),
)
CLOCK = ("decisions", "updates", "hours")
EVALUATION = ("eval_return", "eval_return_min", "eval_return_max", "eval_best_x", "eval_clear_rate", "eval_length")


class Session:
    """One training run as the stage sees it: what is due, what is logged, what is saved."""

    team: Team  # that does the updates, while `loop` runs

    def __init__(self, params: Params, work: Work, run: tracking.Run, interrupt: Interrupt):
        self.params, self.work, self.run, self.interrupt = params, work, run, interrupt
        torch.manual_seed(params.seed)
        self.replay = Replay(params.replay)
        self.replay.load(SEED_DATA)
        envs = [make_env(params.env) for _ in range(params.train.envs)]
        self.agent = Agent(params.agent, params.compute, len(ACTIONS))
        self.archive = Archive(params.archive) if params.archive.share else None
        if self.archive and (SEED_DATA / ARCHIVE).exists():
            self.archive.load(SEED_DATA / ARCHIVE)
        self.training = Training(
            self.agent,
            self.replay,
            Rollout(envs, self.agent.policy(), episode_seeds(params.seed, "train"), self.archive),
            params.train,
            [f"train{i}" for i in range(len(envs))],
            np.random.default_rng(np.random.SeedSequence([params.seed, 1])),
            Counters(decisions=self.replay.decisions),
        )
        self.eval_envs = [make_env(params.env.for_evaluation()) for _ in range(min(2, params.train.eval_episodes))]
        self.losses = Curve(work.path / "losses.csv", (*CLOCK, *LOSSES, "frames_per_second", "updates_per_second"))
        self.evaluations = Curve(work.path / "evaluations.csv", (*CLOCK, *EVALUATION, "best"))
        self.episodes = Curve(
            work.path / "episodes.csv",
            ("decisions", "hours", "seed", "replayed", "return", "best_x", "clear", "outcome", "length"),
        )
        self.seeded = self.frames
        self.snapshots: list[int] = []  # those of QUARTERS that are kept
        self.watch = Watch(params, len(ACTIONS), work.path)
        self.seconds = 0.0  # of training, over all its sittings
        self.best = {"return": None, "frames": None}
        # When each was last done, in frames. An evaluation before the first update would say nothing.
        self.done = dict.fromkeys(("log", "eval", "checkpoint"), self.frames)
        self._since = self._saved = time.monotonic()
        self._window: list[dict[str, torch.Tensor]] = []  # metrics of the updates since the last log
        self._window_start = (time.monotonic(), self.frames, 0)

    @property
    def frames(self) -> int:
        return self.training.counters.decisions * self.params.env.action_repeat

    @property
    def hours(self) -> float:
        return (self.seconds + time.monotonic() - self._since) / 3600

    def clock(self) -> dict[str, Any]:
        counters = self.training.counters
        return {
            "frames": self.frames,
            "decisions": counters.decisions,
            "updates": counters.updates,
            "hours": self.hours,
        }

    def due(self, what: str) -> bool:
        every = getattr(self.params.train, f"{what}_every")
        return self.frames // every > self.done[what] // every

    def record(self, progress: Progress) -> None:
        clock = self.clock()
        for episode in progress.episodes:
            best_x = episode.info["best_x"]
            self.episodes.append(
                {
                    **{key: clock[key] for key in ("frames", "decisions", "hours")},
                    "seed": episode.seed,
                    "replayed": episode.replayed,
                    "return": episode.total_reward,
                    "best_x": best_x,
                    "clear": int(episode.info["clear"]),
                    "outcome": episode.info["outcome"],
                    "length": episode.decisions,
                }
            )
            if not episode.replayed:  # no credit for what an earlier episode did
                self.run.metrics({"episode_return": episode.total_reward, "episode_best_x": best_x}, self.frames)
                self.watch.episodes.append(episode)
        self._window += progress.metrics

    def _means(self) -> dict[str, float]:
        """Of the updates since the last log; the only place where training waits for the device."""
        if not self._window:
            return {}
        stacked = torch.stack([torch.stack([metrics[name].float() for name in LOSSES]) for metrics in self._window])
        return dict(zip(LOSSES, stacked.mean(0).tolist(), strict=True))

    def log(self) -> dict[str, float]:
        """A row of the curves: means over the updates since the last one.

        Raises:
            Diverged: they show that training is broken
        """
        now, (then, frames, updates) = time.monotonic(), self._window_start
        row = self._means()
        self.watch.check(row, self.frames)
        done = self.training.counters.updates - updates
        row["frames_per_second"], row["updates_per_second"] = (self.frames - frames) / (now - then), done / (now - then)
        self.losses.append({**self.clock(), **row})
        self.run.metrics(row, self.frames)
        self.done["log"], self._window = self.frames, []
        self._pause_window()
        return row

    def _pause_window(self) -> None:
        """Throughput is of training alone: the time of evaluations and checkpoints is not in it."""
        self._window_start = (time.monotonic(), self.frames, self.training.counters.updates)

    def evaluate(self) -> dict[str, float]:
        """Sampled episodes from the starts that choose the best checkpoint. Leaves every random state as it was.

        Raises:
            _Stopped: an interrupt came; the evaluation is due again
        """
        seeds = [self.params.train.eval_seed + k for k in range(self.params.train.eval_episodes)]
        video: list[np.ndarray] = []

        def watch(seed: int, env: Any, steps: Steps) -> None:
            if self.interrupt:
                raise _Stopped
            if self.params.train.video_pred_log and seed == seeds[0] and len(video) < VIDEO_LIMIT:
                video.append(env.render())

        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.params.train.eval_seed)
            episodes: list[Episode] = []
            with tqdm(total=len(seeds), desc="evaluate", unit="episode", leave=False) as bar:
                for episode in play_episodes(self.eval_envs, self.agent.policy(), seeds, watch):
                    episodes.append(episode)
                    bar.update()
            if self.params.train.video_pred_log:
                self._log_videos(video)
        returns = [episode.total_reward for episode in episodes]
        row = {
            "eval_return": float(np.mean(returns)),
            "eval_return_min": min(returns),
            "eval_return_max": max(returns),
            "eval_best_x": float(np.mean([episode.info["best_x"] for episode in episodes])),
            "eval_clear_rate": float(np.mean([episode.info["clear"] for episode in episodes])),
            "eval_length": float(np.mean([episode.decisions for episode in episodes])),
        }
        better = self.best["return"] is None or row["eval_return"] > self.best["return"]
        if better:
            self.best = {"return": row["eval_return"], "frames": self.frames}
            checkpoint.save(self.work.path / "best.pt", self._weights())
        self.evaluations.append({**self.clock(), **row, "best": int(better)})
        self.run.metrics(row, self.frames)
        self.done["eval"] = self.frames
        self._pause_window()
        return row

    def _log_videos(self, video: list[np.ndarray]) -> None:
        self.run.video("eval_episode", video, self.frames, fps=15)
        rng = np.random.default_rng(self.params.seed)
        batch = open_loop.sample_sequences(self.replay, 4, VIDEO_STEPS, rng)
        frames = open_loop.frames(batch.obs, self.agent.open_loop(batch), context=5)
        self.run.video("train_openl", frames, self.frames, fps=10)

    def _weights(self) -> dict[str, Any]:
        score = self.best["return"] if self.best["frames"] == self.frames else None
        return {**checkpoint.agent_state(self.agent), "frames": self.frames, "score": score}

    def snapshot(self) -> None:
        """Keeps the weights at each of QUARTERS, counted from the end of the seed data."""
        done, total = self.frames - self.seeded, self.params.train.steps - self.seeded
        for percent in QUARTERS:
            if percent not in self.snapshots and 100 * done >= percent * total:
                checkpoint.save(self.work.path / SNAPSHOTS.format(percent), self._weights())
                self.snapshots.append(percent)

    def save(self, final: bool = False) -> None:
        """Everything that the next round depends on; a final one, after which there is none, leaves out the model's
        states of all that replay holds. Files that only the checkpoint before needed go last.

        Raises:
            Diverged: the weights may be broken; the checkpoint before stays
        """
        self.watch.finite(self._means(), self.frames)
        self.replay.save(self.work.path / "replay")
        self.done["checkpoint"] = self.frames
        state = {
            **self._weights(),
            **self.training.state_dict(),
            "replay": self.replay.state_dict(contexts=not final),
            "random": checkpoint.random_state(),
            "best": self.best,
            "done": self.done,
            "snapshots": self.snapshots,
            "seconds": self.hours * 3600,
            "window": self._window,
            "unsent": [] if final else self.run.waiting(),
        }
        del state["training"]["weights"]  # they are there already
        if final:
            state["posterior"] = None
        checkpoint.save(self.work.path / "latest.pt", state)
        self.replay.prune(self.work.path / "replay")
        self.team.everywhere(give_back_holes)
        self._saved = time.monotonic()
        self._pause_window()

    def restore(self) -> None:
        """The opposite of `save`."""
        state = checkpoint.load(self.work.path / "latest.pt")
        state["training"]["weights"] = state["weights"]
        self.replay.load_state_dict(state["replay"], SEED_DATA, self.work.path / "replay")
        self.training.load_state_dict(state)
        checkpoint.load_random_state(state["random"])
        self.best, self.done, self.seconds = state["best"], state["done"], state["seconds"]
        self.snapshots = state["snapshots"]
        device = self.agent.device
        self._window = [{name: value.to(device) for name, value in row.items()} for row in state["window"]]
        self.run.put_again(state["unsent"])
        for curve in (self.losses, self.evaluations, self.episodes):
            curve.rewind(self.frames)
        self._since = time.monotonic()
        self._pause_window()

    def loop(self) -> None:
        """Trains to the end. An interrupt saves and raises SystemExit."""
        params = self.params
        target = params.train.steps // params.env.action_repeat
        with tqdm(
            total=target,
            initial=self.training.counters.decisions,
            desc="train",
            unit="decision",
            mininterval=1,
            disable=None,  # where no one looks at a terminal, the lines of the watch are enough
        ) as bar:
            rounds = itertools.chain(
                [None], self.training.run(target)
            )  # what was due at the restored checkpoint comes first
            try:
                for progress in rounds:
                    if progress is not None:
                        self.record(progress)
                        bar.update(self.training.counters.decisions - bar.n)
                    if self.interrupt:
                        raise _Stopped
                    self.snapshot()
                    if line := self.watch.line(self.clock()):
                        bar.write(line)
                    if self.due("log"):
                        row = self.log()
                        bar.set_postfix(
                            updates=self.training.counters.updates, model_loss=f"{row.get('model_loss', 0):.0f}"
                        )
                    if self.due("eval"):
                        row = self.evaluate()
                        bar.write(_describe(self.frames, row, self.best))
                    overdue = time.monotonic() - self._saved > 60 * params.train.checkpoint_minutes
                    if overdue or self.due("checkpoint"):
                        self.save()
                if self.done["eval"] != self.frames:
                    bar.write(_describe(self.frames, self.evaluate(), self.best))
                if self._window:
                    self.log()
                self.save(final=True)
            except _Stopped:
                self.save()
                bar.write(f"train: saved at {self.frames} frames; run it again to go on (dvc repro)")
                raise SystemExit(self.interrupt.exit_code) from None


class _Stopped(Exception):
    """An interrupt was seen between two rounds or in an evaluation."""


def _describe(frames: int, row: dict[str, float], best: dict[str, Any]) -> str:
    return (
        f"{frames} frames: return {row['eval_return']:.0f}, best x {row['eval_best_x']:.0f}, "
        f"clear rate {row['eval_clear_rate']:.0%} (best return {best['return']:.0f} at {best['frames']} frames)"
    )


def main() -> None:
    params = load()
    inputs = {
        key: value
        for key, value in params.to_dict().items()
        if key not in ("collect", "evaluate", "render", "promote", "profile")
    }
    data = digest(SEED_DATA)
    work = Work("train", fingerprint(inputs, data))
    if work.notes.get("finished"):
        print(f"train: was finished before with these inputs; taking the result from {work.path}")
        _publish(work)
        return
    resumed = (work.path / "latest.pt").exists()
    if not resumed:
        work.clear()
        for other in work.begin():
            print(f"train: unfinished work on other inputs stays in {other}; remove it if it is not wanted")
        work.note(started=provenance.now(), resumed=0)
    with graceful() as interrupt, tracking.run("train", params, {"data_sha256": data}, work.notes.get("run_id")) as run:
        work.note(run_id=run.run_id)
        session = Session(params, work, run, interrupt)
        with session.agent.team(params.train.batch_size, keep_freed_memory) as session.team:
            if resumed:
                session.restore()
                work.note(resumed=work.notes["resumed"] + 1)
                print(
                    f"train: goes on at {session.frames} frames, {session.training.counters.updates} updates "
                    f"({work.path})"
                )
            session.loop()
        summary = {
            **session.clock(),
            "episodes": session.training.counters.episodes,
            "best_return": session.best["return"],
            "best_frames": session.best["frames"],
            "frames_per_second": session.frames / session.hours / 3600,
            "updates_per_second": session.training.counters.updates / session.hours / 3600,
        }
        (work.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        session.replay.save(work.path / "replay", partial=True)
        session.replay.prune(work.path / "replay")
        _write_provenance(work, params, run, data)
        _publish(work)
        run.artifact(TRAINING, "training")
        work.finish()


def _write_provenance(work: Work, params: Params, run: tracking.Run, data: str) -> None:
    commit, dirty = git.state()
    ran = {"run_id": run.run_id, "parent_run_id": run.parent_run_id, "tracking_uri": run.uri} if run.run_id else None
    content = {
        "commit": commit,
        "dirty": dirty,
        "profile": params.profile,
        "params": params.to_dict(),
        "data_sha256": data,
        "replay_md5": dvc_md5(work.path / "replay"),
        "rom_sha256": rom_sha256(),
        "seed": params.seed,
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        **provenance.surroundings(),
        "started": work.notes["started"],
        "finished": provenance.now(),
        "resumed": work.notes["resumed"],
        "mlflow": ran,
    }
    (work.path / "provenance.json").write_text(json.dumps(content, indent=1) + "\n")


def _publish(work: Work) -> None:
    publish(sorted((work.path / "replay").glob("*.npz")), REPLAY)
    names = ("best.pt", "latest.pt", "provenance.json", *map(SNAPSHOTS.format, QUARTERS))
    publish([work.path / name for name in names], CHECKPOINTS)
    publish([work.path / name for name in ("losses.csv", "evaluations.csv", "episodes.csv", "summary.json")], TRAINING)
