"""A pixel game small enough to be mastered in minutes on two cores: walk to the goal."""

from typing import Any

import gymnasium
import numpy as np

CELLS = 8  # a row of cells, each 8 pixels wide
LIMIT = 24  # decisions


class Corridor(gymnasium.Env):
    """The walker starts in one of the left four cells, the goal is the rightmost. Of the seven actions one steps right,
    one left, one jumps two cells to the right but only from an even cell; the others stand still. Each decision costs
    1, the goal pays 20. Best return from cell s: 20 minus the fewest decisions."""

    RIGHT, JUMP, LEFT = 1, 2, 6

    def __init__(self):
        self.observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(7)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.start = self.cell = int(self.np_random.integers(4))
        self.time = 0
        return self._observe(), self._info()

    def step(self, action: int):
        self.time += 1
        if action == self.JUMP:
            self.cell = min(self.cell + 2, CELLS - 1) if self.cell % 2 == 0 else self.cell
        else:
            self.cell = int(np.clip(self.cell + {self.RIGHT: 1, self.LEFT: -1}.get(action, 0), 0, CELLS - 1))
        goal = self.cell == CELLS - 1
        return self._observe(), 19.0 if goal else -1.0, goal, self.time >= LIMIT and not goal, self._info()

    @staticmethod
    def best_return(start: int) -> float:
        decisions = {start: 0}
        frontier = [start]
        while CELLS - 1 not in decisions:
            cell = frontier.pop(0)
            for reached in (cell + 1, min(cell + 2, CELLS - 1) if cell % 2 == 0 else cell):
                if reached not in decisions:
                    decisions[reached] = decisions[cell] + 1
                    frontier.append(reached)
        return 20.0 - decisions[CELLS - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "cell": self.cell, "time": self.time}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.cell, self.time = state["start"], state["cell"], state["time"]

    def _observe(self) -> np.ndarray:
        obs = np.full((64, 64, 3), 40, np.uint8)
        obs[40:56, 56:64] = (40, 200, 40)
        obs[40:56, 8 * self.cell : 8 * self.cell + 8] = (230, 60, 40)
        return obs

    def _info(self) -> dict[str, Any]:
        clear = self.cell == CELLS - 1
        return {"best_x": self.cell, "clear": clear, "outcome": "flag" if clear else None, "start": self.start}
