"""The only policy-environment loop: training, evaluation, rendering and play all use it.

Time runs so, in replay as here: a step holds what arrives together.

    t           0            1            2                 T
    obs         o_0          o_1          o_2       ...     o_T
    action      -            a_0          a_1               a_{T-1}      the one that led to obs
    reward      0            r_1          r_2               r_T          received on arriving
    is_first    1            0            0                 0
    is_last     0            0            0                 1            the episode ends here
    is_terminal 0            0            0                 0 or 1       1: by itself; 0: cut off, value goes on
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import gymnasium
import numpy as np

from dreamer.archive import Archive

NO_ACTION = -1  # the action of a first step


def episode_seeds(seed: int, purpose: str) -> Callable[[int], int]:
    """Gives the k-th of an endless list of seeds, another list for every `seed` and `purpose`."""
    return lambda k: int(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), k]).generate_state(1)[0])


class Policy(Protocol):
    """Acts for N environments at once and keeps what it must remember of each. To be resumed in the middle of episodes
    it also has `state_dict` and `load_state_dict`; to train from what it remembered, `latents`."""

    def __call__(self, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """(N, 64, 64, 3) uint8 and (N,) bool to (N,) int64. Where `is_first`, the past is forgotten."""


class RandomPolicy:
    """Draws actions independently with fixed probabilities."""

    def __init__(self, probabilities: Sequence[float], seed: int):
        self._cumulative = np.cumsum(probabilities) / np.sum(probabilities)
        self._rng = np.random.default_rng(seed)

    def __call__(self, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        draws = self._rng.random(len(obs))
        return np.searchsorted(self._cumulative, draws, side="right").clip(max=len(self._cumulative) - 1)

    def state_dict(self) -> dict[str, Any]:
        return self._rng.bit_generator.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state


class RecordedPolicy:
    """Plays recorded actions again, one list an episode, in the order in which N = 1 environment starts them."""

    def __init__(self, episodes: Sequence[Sequence[int]]):
        self._episodes = iter(episodes)
        self._actions: Iterator[int] = iter(())

    def __call__(self, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        if is_first[0]:
            self._actions = iter(next(self._episodes))
        return np.array([next(self._actions, 0)])


@dataclass
class Steps:
    """One step of each of N environments, aligned as above."""

    obs: np.ndarray  # (N, 64, 64, 3) uint8
    action: np.ndarray  # (N,) int64, NO_ACTION where is_first
    reward: np.ndarray  # (N,) float32
    is_first: np.ndarray  # (N,) bool
    is_last: np.ndarray  # (N,) bool
    is_terminal: np.ndarray  # (N,) bool

    @classmethod
    def empty(cls, n: int, obs_shape: tuple[int, ...]) -> "Steps":
        flags = {name: np.zeros(n, bool) for name in ("is_first", "is_last", "is_terminal")}
        return cls(np.zeros((n, *obs_shape), np.uint8), np.full(n, NO_ACTION), np.zeros(n, np.float32), **flags)

    def copy(self) -> "Steps":
        return Steps(**{field.name: getattr(self, field.name).copy() for field in fields(self)})


@dataclass
class Episode:
    """What happened between a reset and an end. `info` is the environment's at the last step; its outcome is "passed"
    where `Archive.passed` ended the episode."""

    seed: int
    total_reward: float
    decisions: int
    info: dict[str, Any]
    options: dict[str, Any]  # of the reset; empty: from the start, which `seed` draws

    @property
    def replayed(self) -> int:
        """Decisions of another episode that led to where this one began; 0: it began at the start."""
        return len(self.options.get("actions", ()))


class Rollout:
    """N environments stepped side by side, each in a thread, by one policy in one batch.

    Args:
        seed_of: the seed of the k-th episode begun, k from 0; None ends: an environment that gets it stays idle.
        archive: where episodes may begin; absent: at the start, all of them
    """

    def __init__(
        self,
        envs: Sequence[gymnasium.Env],
        policy: Policy,
        seed_of: Callable[[int], int | None],
        archive: Archive | None = None,
    ):
        self.envs, self.policy, self.seed_of, self.archive = list(envs), policy, seed_of, archive
        self.begun = 0  # episodes
        self._threads = ThreadPoolExecutor(len(self.envs), thread_name_prefix="env")
        self._now: Steps | None = None
        self._flying: list[Future[None]] = []  # one an environment, between `launch` and `wait`
        self.running: list[Episode | None] = [None] * len(self.envs)  # each environment's episode

    @property
    def idle(self) -> np.ndarray:
        """(N,) bool: environments that have no episode (any more)."""
        return np.array([episode is None for episode in self.running])

    def step(self) -> tuple[Steps, list[Episode], int]:
        """The next step of every environment: `launch` and `wait`.

        Returns:
            steps, the episodes that ended with them, the number of decisions taken
        """
        taken = self.launch()
        return *self.wait(), taken

    def launch(self) -> int:
        """Decides with the policy as it is now and lets the environments begin their next step. Until `wait` returns,
        nothing else of the rollout may be used, nor the `Steps` it gave last.

        An environment whose last step ended an episode starts the next one: its step is a first step and no decision.

        Returns:
            the number of decisions taken
        """
        n = len(self.envs)
        if self._now is None:
            self._now = Steps.empty(n, self.envs[0].observation_space.shape)
            starting, actions = np.ones(n, bool), np.full(n, NO_ACTION)
        else:
            actions = self.policy(self._now.obs, self._now.is_first)
            starting = self._now.is_last
        for i in np.flatnonzero(starting):
            seed = self.seed_of(self.begun)
            self.begun += seed is not None
            options = self.archive.draw(seed) if self.archive and seed is not None else {}
            self.running[i] = None if seed is None else Episode(seed, 0.0, 0, {}, options)
        taken = int((~starting & ~self.idle).sum())
        self._flying = [
            self._threads.submit(self._advance, *of_one)
            for of_one in zip(range(n), actions.tolist(), starting.tolist(), strict=True)
        ]
        return taken

    def wait(self) -> tuple[Steps, list[Episode]]:
        """The step that was launched and the episodes that ended with it. What an environment raised is raised here."""
        flying, self._flying = self._flying, []
        for future in flying:
            future.result()
        ended = [self.running[i] for i in np.flatnonzero(self._now.is_last)]
        if self.archive:
            for i in np.flatnonzero(~self.idle):
                self.archive.see(int(i), self._now.is_first[i], self.running[i].info, self.envs[i].state_dict)
            for episode in ended:
                if not (episode.replayed or episode.info["clear"]):
                    self.archive.fail(episode.info)
        return self._now, ended

    def _advance(self, i: int, action: int, start: bool) -> None:
        now, env, episode = self._now, self.envs[i], self.running[i]
        if episode is None:
            now.is_first[i], now.is_last[i], now.is_terminal[i], now.reward[i] = False, False, False, 0.0
            return
        if start:
            obs, episode.info = env.reset(seed=episode.seed, options=episode.options)
            action, reward, terminated, truncated = NO_ACTION, 0.0, False, False
        else:
            obs, reward, terminated, truncated, episode.info = env.step(action)
            episode.total_reward += float(reward)
            episode.decisions += 1
            if self.archive and not (terminated or truncated) and self.archive.passed(episode.options, episode.info):
                truncated, episode.info = True, {**episode.info, "outcome": "passed"}
        now.obs[i], now.action[i], now.reward[i] = obs, action, reward
        now.is_first[i], now.is_last[i], now.is_terminal[i] = start, terminated or truncated, terminated

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, but for the policy's weights. Only while no step is in flight."""
        return {
            "begun": self.begun,
            "now": None if self._now is None else asdict(self._now),
            "running": [episode and asdict(episode) for episode in self.running],
            "envs": [env.state_dict() for env in self.envs],
            "policy": self.policy.state_dict(),
            "archive": self.archive and self.archive.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun = state["begun"]
        self._now = state["now"] and Steps(**{name: np.array(value) for name, value in state["now"].items()})
        self.running = [episode and Episode(**episode) for episode in state["running"]]
        list(self._threads.map(lambda env, past: env.load_state_dict(past), self.envs, state["envs"]))
        self.policy.load_state_dict(state["policy"])
        if self.archive:
            self.archive.load_state_dict(state["archive"])

    def stop(self) -> None:
        """Ends the threads; the environments stay open."""
        self._threads.shutdown()


def play_episodes(
    envs: Sequence[gymnasium.Env],
    policy: Policy,
    seeds: Sequence[int],
    on_step: Callable[[int, gymnasium.Env, Steps], None] | None = None,
) -> Iterator[Episode]:
    """Plays one episode a seed and yields each as it ends. The environments stay open.

    Args:
        on_step: called after every step of an episode with its seed, its environment and a view of its `Steps` (N = 1)
    """
    rollout = Rollout(envs[: len(seeds)], policy, lambda k: seeds[k] if k < len(seeds) else None)
    remaining = len(seeds)
    try:
        while remaining:
            steps, ended, _ = rollout.step()
            if on_step:
                for i, (env, episode) in enumerate(zip(rollout.envs, rollout.running, strict=True)):
                    if episode is not None:
                        view = Steps(**{field.name: getattr(steps, field.name)[i : i + 1] for field in fields(Steps)})
                        on_step(episode.seed, env, view)
            remaining -= len(ended)
            yield from ended
    finally:
        rollout.stop()
