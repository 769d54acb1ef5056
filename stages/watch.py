"""Watches training: one line a minute for whoever looks, and a stop when it cannot get well again."""

import math
import time
from collections import deque
from contextlib import suppress
from typing import Any

import psutil

from dreamer.rollout import Episode
from stages.params import Params

EVERY = 60  # seconds
RECENT = 20  # episodes
PATIENCE = 3  # logs in a row without any entropy left
FASTEST = 4  # pixels a frame: Mario runs at 2.5
FAR = 10  # times what is possible
SURE = 0.02  # nats of entropy; no policy that learned 1-1 has come below 0.2


class Diverged(RuntimeError):
    """Training is broken and would not recover. The message names the sign, what is kept and the remedy."""


class Watch:
    """Of one training run.

    Args:
        where: the directory of its checkpoints, for messages
        actions: A
    """

    def __init__(self, params: Params, actions: int, where: object):
        env, behavior = params.env, params.behavior
        self.total, self.where = params.train.steps, where
        decisions = min(env.time_limit, 1 / (1 - behavior.discount) if behavior.discount < 1 else math.inf)
        pixels = FASTEST * env.action_repeat * decisions
        self.value_limit = FAR * (abs(env.reward.flag) + abs(env.reward.death) + abs(env.reward.progress) * pixels + 1)
        # Unimix leaves this much entropy to a policy that is sure everywhere.
        other = behavior.unimix_ratio / actions
        sure = 1 - (actions - 1) * other
        mixture = -(sure * math.log(sure) + (actions - 1) * other * math.log(other or 1))
        self.entropy_limit = max(SURE, 1.1 * mixture)
        self.episodes: deque[Episode] = deque(maxlen=RECENT)
        self._row: dict[str, float] = {}
        self._sure = 0  # logs in a row
        self._last: tuple[float, dict[str, Any]] | None = None

    def finite(self, means: dict[str, float], frames: int) -> None:
        """
        Raises:
            Diverged: one of the losses is NaN or infinite, or the critic expects what no episode can give
        """
        remedy = (
            f"what was saved before is kept in {self.where}; lower optimizers.*.lr or use compute.precision: float32"
        )
        if bad := [name for name, value in means.items() if not math.isfinite(value)]:
            raise Diverged(f"train: {bad[0]} is not finite at {frames} frames; {remedy}")
        if (value := abs(means.get("imag_value", 0.0))) > self.value_limit:
            raise Diverged(
                f"train: the critic's values explode at {frames} frames: {value:.3g} on average, where "
                f"{self.value_limit / FAR:.3g} would be much; {remedy}"
            )

    def check(self, means: dict[str, float], frames: int) -> None:
        """Of each log's means.

        Raises:
            Diverged: as `finite`; or the policy has had no entropy left for a while, and does not clear the level
        """
        self.finite(means, frames)
        self._row = means or self._row
        sure = means.get("policy_entropy", math.inf) < self.entropy_limit
        self._sure = self._sure + 1 if sure and not any(episode.info["clear"] for episode in self.episodes) else 0
        if self._sure >= PATIENCE:
            raise Diverged(
                f"train: at {frames} frames the policy's entropy has collapsed to {means['policy_entropy']:.3g} and no "
                f"episode of the last clears; best.pt in {self.where} is kept; raise behavior.entropy"
            )

    def line(self, clock: dict[str, Any]) -> str | None:
        """Once a minute, how training stands; else None. Rates are since the line before.

        Args:
            clock: `frames` and `updates` so far
        """
        now = time.monotonic()
        if self._last is None:
            self._last = now, clock
        then, before = self._last
        if now - then < EVERY:
            return None
        self._last = now, clock
        frames, updates = ((clock[key] - before[key]) / (now - then) for key in ("frames", "updates"))
        parts = [f"{clock['frames']} of {self.total} frames", f"{frames:.0f} frames/s, {updates:.2f} updates/s"]
        if self._row:
            names = {"model_loss": "model", "value_loss": "value", "policy_entropy": "entropy", "imag_return": "return"}
            parts.append(", ".join(f"{short} {self._row[name]:.3g}" for name, short in names.items()))
        if self.episodes:
            best = [episode.info["best_x"] for episode in self.episodes]
            clears = sum(episode.info["clear"] for episode in self.episodes)
            parts.append(
                f"last {len(best)} episodes: best x {sum(best) / len(best):.0f}, at most {max(best)}, {clears} cleared"
            )
        parts.append(f"{_memory() / 1e9:.1f} GB")
        if frames:
            left = round((self.total - clock["frames"]) / frames / 60)
            parts.append(f"{left // 60}:{left % 60:02} h left")
        return f"{time.strftime('%H:%M')}  " + " | ".join(parts)


def _memory() -> int:
    """Bytes of this process and of those it started; what they share with it is counted once."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found = child.memory_info()
            total += found.rss - getattr(found, "shared", 0)
    return total
