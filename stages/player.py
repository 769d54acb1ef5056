"""The agent as MLflow serves it: plays from frames alone, and remembers between calls what it has seen."""

from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import ComputeConfig
from stages import tracking
from stages.agents import load_agent

COMPUTE = ComputeConfig(device="auto", precision="float32", compile=False)


class Player:
    """The model of `stages.tracking.serve`. Frames are (N, 64, 64, 3) uint8, of N games played side by side."""

    def load_context(self, context: Any) -> None:
        self._policy = load_agent(Path(context.artifacts["bundle"]), COMPUTE).policy()

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, bool] | None = None) -> np.ndarray:
        """The next action of each game, (N,) int64 indices into `dreamer.mario.ACTIONS`.

        The first call, and one with another N, begins new episodes.

        Args:
            params: "reset": begin new episodes now; "deterministic": take the most likely action rather than draw one

        Raises:
            ValueError: the frames have another shape or type; one line
        """
        frames = np.asarray(model_input)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (64, 64, 3) or not len(frames):
            raise ValueError(f"frames must be (N, 64, 64, 3) uint8, got {frames.shape} {frames.dtype}")
        params, policy = params or {}, self._policy
        new = bool(params.get("reset")) or policy.action is None or len(policy.action) != len(frames)
        policy.greedy = bool(params.get("deterministic"))
        return policy(frames, np.full(len(frames), new))


tracking.serve(Player)
