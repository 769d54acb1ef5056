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

# Bytes of the game's memory that tell what goes on, in the game's own numbers.
_STATE, _HEIGHT, _FLOAT, _MODE, _TIMER = 0x0E, 0xB5, 0x1D, 0x0770, 0x06DE
_NORMAL = 8  # of states


def make_env(config: EnvConfig) -> gymnasium.Env:
    """The game at `config.level`, as `MarioEnv`."""
    return MarioEnv(config)


@functools.cache
def rom_sha256() -> str:
    """Hex digest of the ROM that ships with gym-super-mario-bros."""
    from gym_super_mario_bros._roms import smb1_rom_path

    return hashlib.sha256(Path(smb1_rom_path()).read_bytes()).hexdigest()


class Camera:
    """Sees two screens as one picture: their maximum, area-resized.

    Exact, in integers. A pixel of the picture covers 4 columns and 3.75 rows of the screen: 15 rows become 4, and 3 of
    the 15 are shared by two of the 4, in quarters. Whole words are summed, with all three colours in them, and again
    shifted by 8 bits, with green alone. The difference has red in the upper half of a word and blue in the lower.

    All arrays but the picture live as long as the camera: with new ones each time it takes five times as long.
    """

    def __init__(self, screen: np.ndarray):
        """`screen`: (240, 256) uint32 of 0x00RRGGBB, the emulator's own memory, which changes with every frame."""
        self._screen, self._kept = screen, np.empty_like(screen)
        self._screen_bytes, self._kept_bytes = screen.view(np.uint8), self._kept.view(np.uint8)
        self._kept_halves = self._kept.view(np.uint16)
        pairs = self._kept.view(np.uint64).reshape(16, 15, SIZE, 2)  # of words
        self._left, self._right = pairs[..., 0], pairs[..., 1]
        rows = np.zeros((16, 2, 16, SIZE), np.uint64)  # 15 and an empty one, which makes it four times four
        self._colours, self._greens = rows[:15].transpose(1, 2, 0, 3)
        self._fours, self._shared = rows.reshape(4, 4, 2, 16, SIZE), rows[3:15:4].view(np.uint32)
        self._pair_sums = np.empty((4, 2, 16, SIZE), np.uint64)
        self._sums = self._pair_sums.view(np.uint32)
        self._above, self._below = self._sums[:3], self._sums[1:]
        self._moved, self._quarters = np.empty_like(self._above), np.array([1, 2, 3], np.uint32).reshape(3, 1, 1, 1)
        self._even, self._odd = self._sums[..., 0::2], self._sums[..., 1::2]
        self._totals = np.empty((4, 2, 16, SIZE), np.uint32)
        self._colour, self._green = self._totals.swapaxes(0, 1)
        self._shifted, self._halves = np.empty_like(self._green), self._totals.view(np.uint16)
        red_blue, green = self._halves.reshape(4, 2, 16, SIZE, 2).transpose(1, 2, 0, 3, 4)
        self._red, self._green_half, self._blue = red_blue[..., 1], green[..., 0], red_blue[..., 0]

    def keep(self) -> None:
        """Takes the screen as the first of two."""
        np.copyto(self._kept, self._screen)

    def picture(self) -> np.ndarray:
        """(64, 64, 3) uint8 RGB of the screen that was kept and of the present one. What was kept is lost."""
        np.maximum(self._kept_bytes, self._screen_bytes, out=self._kept_bytes)
        np.add(self._left, self._right, out=self._colours)
        np.right_shift(self._kept_halves, 8, out=self._kept_halves)
        np.add(self._left, self._right, out=self._greens)

        np.add.reduce(self._fours, axis=1, out=self._pair_sums)
        np.left_shift(self._sums, 2, out=self._sums)
        np.multiply(self._shared, self._quarters, out=self._moved)
        np.subtract(self._above, self._moved, out=self._above)
        np.add(self._below, self._moved, out=self._below)
        np.add(self._even, self._odd, out=self._totals)

        np.left_shift(self._green, 8, out=self._shifted)
        np.subtract(self._colour, self._shifted, out=self._colour)
        np.add(self._halves, 30, out=self._halves)  # of 60 quarters: rounds
        np.floor_divide(self._halves, 60, out=self._halves)
        picture = np.empty((16, 4, SIZE, 3), np.uint8)
        picture[..., 0], picture[..., 1], picture[..., 2] = self._red, self._green_half, self._blue
        return picture.reshape(SIZE, SIZE, 3)


class _Game(SuperMarioBrosEnv):
    """Its frames, without the reward and the forty details that it works out after each, for which there is no use."""

    def advance(self, buttons: int) -> bool:
        """One frame, and on past what the game shows between two areas. True at the end of the episode."""
        if self.done:
            raise ValueError("the episode is over; reset")
        self._frame_advance(buttons)
        ram = self.ram
        if ram[_STATE] == _NORMAL and ram[_HEIGHT] < 2 and ram[_FLOAT] != 3 and ram[_MODE] < 2 and ram[_TIMER] < 2:
            return False  # most frames: neither dying nor at the flag nor between two areas
        self.done = self._get_terminated()
        self._did_step(self.done)
        return self.done

    def _ram_buffer(self) -> memoryview:
        return memoryview(super()._ram_buffer())  # gives a byte in half the time that numpy takes

    def _read_mem_range(self, address: int, length: int) -> int:
        return functools.reduce(lambda number, digit: 10 * number + digit, self.ram[address : address + length], 0)


class MarioEnv(gymnasium.Env):
    """One decision is `action_repeat` frames with the same buttons; it ends early when the episode does.

    Observation: (64, 64, 3) uint8, the maximum of the decision's last two frames. Reward, end of episode and starts are
    as `EnvConfig` says: death and flag terminate, the time limit and a stall truncate.

    `info` of every step: `decisions` so far, `x` and `best_x` in pixels, `clock` in the game's ticks, `clear`, and
    `outcome`: None, "flag", "death", "time limit" or "stall".
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": FRAMES_PER_SECOND}
    render_mode = "rgb_array"

    def __init__(self, config: EnvConfig):
        self.config = config
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))
        world, stage = map(int, config.level.split("-"))
        self._game = _Game(target=(world, stage))
        pixels = np.lib.stride_tricks.as_strided(self._game.screen[..., ::-1], (*SCREEN[:2], 4), (1024, 4, 1))
        self._camera = Camera(pixels.view(np.uint32)[..., 0])
        self._noops, self._history = 0, []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start of the level after 0 to `noop_max` no-op frames, drawn from `seed` or given as `options["noops"]`; then
        `options["actions"]`, as if they had been stepped. `state_dict` gives such options."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(self.config.noop_max + 1))
        self._noops, self._history = (options or {}).get("noops", drawn), []
        self._game.reset()
        self._camera.keep()
        for _ in range(self._noops):
            self._camera.keep()
            self._game.advance(0)
        self._best_x, self._since_best, self._clock = self._game._x_position, 0, self._game._time
        picture, info = self._camera.picture(), self._info(None)
        for action in (options or {}).get("actions", ()):
            picture, _, _, _, info = self.step(action)
        return picture, info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._history.append(int(action))
        terminated = False
        for _ in range(self.config.action_repeat):
            self._camera.keep()
            terminated = self._game.advance(_BUTTONS[action])
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
        return self._camera.picture(), value, terminated, outcome in ("time limit", "stall"), self._info(outcome)

    def render(self) -> np.ndarray:
        """The screen as the player sees it, (240, 256, 3) uint8."""
        return self._game.screen.copy()

    def state_dict(self) -> dict[str, Any]:
        """The episode so far. The emulator is deterministic, so its actions are its state."""
        return {"noops": self._noops, "actions": list(self._history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Plays the episode again up to where `state_dict` was taken (about 150 decisions a second)."""
        self.reset(options=state)

    def snapshot(self) -> tuple[Any, ...]:
        """The game as it is now, for `restore` of this same environment: at once, where `load_state_dict` plays again.
        An episode that has ended has none to go on from."""
        return self._game.dump_state(), self._noops, list(self._history), self._best_x, self._since_best, self._clock

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Goes back to where `snapshot` was taken, screen included."""
        state, self._noops, history, self._best_x, self._since_best, self._clock = snapshot
        self._history = list(history)
        self._game.load_state(state)

    def close(self) -> None:
        self._game.close()

    def _info(self, outcome: str | None) -> dict[str, Any]:
        return {
            "decisions": len(self._history),
            "x": self._game._x_position,
            "best_x": self._best_x,
            "clock": self._clock,
            "clear": outcome == "flag",
            "outcome": outcome,
        }
