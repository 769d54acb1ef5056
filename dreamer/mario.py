"""Super Mario Bros as a Gymnasium environment. The only file that knows the game."""

import functools
import hashlib
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gym_super_mario_bros import SuperMarioBrosEnv

from dreamer.config import EnvConfig

SIZE = 64  # height and width of an observation
SCREEN = (240, 256, 3)  # what the emulator draws
FRAMES_PER_SECOND = 60

_RIGHT, _LEFT, _B, _A = 0x80, 0x40, 0x02, 0x01
ACTIONS = {  # the document's seven, in its order, as the joypad's bits
    "noop": 0,
    "right": _RIGHT,
    "right+A": _RIGHT | _A,
    "right+B": _RIGHT | _B,
    "right+A+B": _RIGHT | _A | _B,
    "A": _A,
    "left": _LEFT,
}
_BUTTONS = tuple(ACTIONS.values())


def make_env(config: EnvConfig) -> gymnasium.Env:
    """The game at `config.level`, as `MarioEnv`."""
    return MarioEnv(config)


@functools.cache
def rom_sha256() -> str:
    """Hex digest of the ROM that ships with gym-super-mario-bros."""
    from gym_super_mario_bros._roms import smb1_rom_path

    return hashlib.sha256(Path(smb1_rom_path()).read_bytes()).hexdigest()


def shrink(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The maximum of two screens, area-resized: two (240, 256) uint32 of 0x00RRGGBB to (64, 64, 3) uint8 RGB.

    Exact, by integer sums of two channels at a time in the halves of 32-bit words. A pixel of the output covers 4
    columns and 3.75 rows of the input: 15 rows become 4, and 3 of the 15 are shared between neighbours in quarters.
    """
    pixels = np.maximum(first.view(np.uint8), second.view(np.uint8)).view(np.uint32).reshape(SCREEN[0], SIZE, 4)
    sums = []  # of 60 quarter pixels each, plus half of that to round
    for part in (pixels & 0x00FF00FF, (pixels >> 8) & 0x000000FF):
        x = (part[..., 0] + part[..., 1] + part[..., 2] + part[..., 3]).reshape(16, 15, SIZE)
        whole = [4 * (x[:, i] + x[:, i + 1] + x[:, i + 2]) for i in (0, 4, 8, 12)]
        shared = [(3 * x[:, 3], 0), (x[:, 3], 2 * x[:, 7]), (2 * x[:, 7], x[:, 11]), (0, 3 * x[:, 11])]
        rows = [middle + above + below for middle, (above, below) in zip(whole, shared, strict=True)]
        sums.append(np.stack(rows, 1).reshape(SIZE, SIZE) + 0x001E001E)
    red_blue, green = sums
    return np.stack([(red_blue >> 16) // 60, (green & 0xFFFF) // 60, (red_blue & 0xFFFF) // 60], -1).astype(np.uint8)


class _Game(SuperMarioBrosEnv):
    """Without the reward and the forty details that it works out after each frame, for which there is no use here."""

    def _get_reward(self) -> float:
        return 0.0

    def _get_info(self) -> dict[str, Any]:
        return {}


class MarioEnv(gymnasium.Env):
    """One decision is `action_repeat` frames with the same buttons; it ends early when the episode does.

    Observation: (64, 64, 3) uint8, the maximum of the decision's last two frames. Reward, end of episode and starts are
    as `EnvConfig` says: death and flag terminate, the time limit and a stall truncate.

    `info` of every step: `x` and `best_x` in pixels, `clock` in the game's ticks, `clear`, and `outcome`: None, "flag",
    "death", "time limit" or "stall".
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": FRAMES_PER_SECOND}
    render_mode = "rgb_array"

    def __init__(self, config: EnvConfig):
        self.config = config
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))
        world, stage = map(int, config.level.split("-"))
        self._game = _Game(target=(world, stage))
        # The emulator's own memory, read-write: one 0x00RRGGBB word a pixel.
        self._pixels = np.lib.stride_tricks.as_strided(self._game.screen[..., ::-1], (*SCREEN[:2], 4), (1024, 4, 1))
        self._previous = np.empty(SCREEN[:2], np.uint32)
        self._noops, self._history = 0, []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start of the level after 0 to `noop_max` no-op frames, drawn from `seed` or given as `options["noops"]`."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(self.config.noop_max + 1))
        self._noops, self._history = (options or {}).get("noops", drawn), []
        self._game.reset()
        self._keep_frame()
        for _ in range(self._noops):
            self._keep_frame()
            self._game.step(0)
        self._best_x, self._since_best, self._clock = self._game._x_position, 0, self._game._time
        return self._observe(), self._info(None)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._history.append(int(action))
        terminated = False
        for _ in range(self.config.action_repeat):
            self._keep_frame()
            _, _, terminated, _, _ = self._game.step(_BUTTONS[action])
            if terminated:
                break
        flag, reward = terminated and self._game._flag_get, self.config.reward
        progress = max(0, self._game._x_position - self._best_x)
        ticks = max(0, self._clock - self._game._time)
        self._best_x, self._clock = self._best_x + progress, self._game._time
        self._since_best = 0 if progress else self._since_best + 1
        value = reward.progress * progress - reward.clock * ticks
        if terminated:
            value += reward.flag if flag else -reward.death
            outcome = "flag" if flag else "death"
        elif len(self._history) >= self.config.time_limit:
            outcome = "time limit"
        elif self.config.stall_limit and self._since_best >= self.config.stall_limit:
            outcome = "stall"
        else:
            outcome = None
        return self._observe(), value, terminated, outcome in ("time limit", "stall"), self._info(outcome)

    def render(self) -> np.ndarray:
        """The screen as the player sees it, (240, 256, 3) uint8."""
        return self._game.screen.copy()

    def state_dict(self) -> dict[str, Any]:
        """The episode so far. The emulator is deterministic, so its actions are its state."""
        return {"noops": self._noops, "actions": list(self._history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Plays the episode again up to where `state_dict` was taken (about 150 decisions a second)."""
        self.reset(options={"noops": state["noops"]})
        for action in state["actions"]:
            self.step(action)

    def close(self) -> None:
        self._game.close()

    def _words(self) -> np.ndarray:
        return self._pixels.view(np.uint32)[..., 0]

    def _keep_frame(self) -> None:
        self._previous[:] = self._words()

    def _observe(self) -> np.ndarray:
        return shrink(self._previous, self._words())

    def _info(self, outcome: str | None) -> dict[str, Any]:
        return {
            "x": self._game._x_position,
            "best_x": self._best_x,
            "clock": self._clock,
            "clear": outcome == "flag",
            "outcome": outcome,
        }
