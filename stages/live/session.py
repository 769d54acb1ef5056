"""A game that is watched, with the agent's mind beside it. A state machine that knows nothing of browsers.

The agent plays by `AgentPolicy` in a `Rollout`, as in evaluation: with the same seed it does the same, whatever is
looked at meanwhile. At every step its decision is already made and shown, and carried out by the next step.

A dream begins at the state that is shown and goes on inside the world model, by the agent or by hand. The real game
answers the same actions beside it. On leaving, it goes back to where it was, as if nobody had dreamt.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dreamer.agent import Agent
from dreamer.mario import MarioEnv
from dreamer.networks import State
from dreamer.rollout import Rollout, Steps
from stages.live.errors import LiveError
from stages.live.hands import Hands
from stages.live.mind import Mind, Thoughts

AHEAD = 15  # decisions that are dreamt ahead
HISTORY = 400  # steps that the charts know
EPISODES = 200  # that the list knows


@dataclass
class Film:
    """What comes next, as dreamt."""

    actions: np.ndarray  # (H,), the ones that lead to
    thoughts: Thoughts  # (H,)
    step: int  # at which it was dreamt


@dataclass
class Dream:
    """What happens inside the world model, and what the real game answers."""

    snapshot: tuple[Any, ...]  # of the game, to go back to
    state: State
    thoughts: Thoughts
    action: int  # decided in `state`
    obs: np.ndarray  # the real game's
    info: dict[str, Any]
    decisions: int = 0
    total_reward: float = 0.0  # as dreamt
    real_total: float = 0.0
    over: bool = False  # the real game


class Session:
    """
    Args:
        load: the agent of a model's name; raises an error of one line
        new_game: the environment of a level; likewise
    """

    def __init__(
        self,
        load: Callable[[str], Agent],
        new_game: Callable[[str], MarioEnv],
        model: str,
        level: str,
        seed: int = 0,
        greedy: bool = False,
    ):
        self._load, self._new_game = load, new_game
        self.greedy, self.hands = greedy, Hands()
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.episodes: deque[dict[str, Any]] = deque(maxlen=EPISODES)
        self.ended = 0  # episodes, so that a change of the list is noticed
        self.dream: Dream | None = None
        self.film: Film | None = None
        self.model, self.agent = model, load(model)
        self.level, self.env = level, new_game(level)
        self._start(seed)

    # The game

    def begin(self, seed: int, level: str | None = None) -> None:
        """Starts an episode; the one in progress is listed as stopped. The next ones have the seeds that follow.

        Raises:
            LiveError, ConfigError: there is no such seed or level
        """
        if not 0 <= seed < 2**32:
            raise LiveError(f"seed {seed}: must be 0 to {2**32 - 1}")
        env = self.env if level in (None, self.level) else self._new_game(level)
        self._stop()
        if env is not self.env:
            self.env.close()
            self.env, self.level = env, level
        self._start(seed)

    def pick(self, model: str) -> None:
        """Another model plays the same start.

        Raises:
            CheckpointError, TrackingError: there is no such model; the session goes on with the one it has
        """
        agent, seed = self._load(model), self.episode.seed
        self._stop()
        self.model, self.agent = model, agent
        self._start(seed)

    def step(self) -> None:
        """Carries out the decision, in the game or in the dream, and makes the next one."""
        self._dream_on() if self.dream else self._advance()

    def set_greedy(self, greedy: bool) -> None:
        """From the next decision on."""
        self.greedy = self.policy.greedy = greedy

    def close(self) -> None:
        self._rollout.stop()
        self.env.close()

    @property
    def episode(self):
        return self._rollout.running[0]

    def _start(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.policy, self.mind = self.agent.policy(self.greedy), Mind(self.agent, seed)
        self._rollout = Rollout([self.env], self._decided, lambda k: seed + k)
        self.steps: Steps
        self._advance()

    def _advance(self) -> None:
        self.steps, ended, _ = self._rollout.step()
        if self.steps.is_first[0]:
            self._players: list[str] = []
        self.action = int(self.policy(self.steps.obs, self.steps.is_first)[0])
        self.thoughts = self.mind.think(self.policy.state)
        reward = None if self.steps.is_first[0] else float(self.steps.reward[0])
        self._remember(self.thoughts, reward, self.episode.decisions)
        if ended:
            self._list(self.episode.info["outcome"])

    def _decided(self, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """The policy of the rollout: what was decided at the last step, unless a person takes over."""
        if self.hands.on:
            self.action = self.hands.action()
            self.policy.action = self.agent.one_hot(torch.tensor([self.action], device=self.agent.device))
        player = self._player()
        if player not in self._players and not self.steps.is_last[0]:
            self._players.append(player)
        return np.array([self.action])

    def _player(self) -> str:
        return "you" if self.hands.on else "greedy" if self.greedy else "sampled"

    def _stop(self) -> None:
        """Ends what is in progress."""
        self.leave_dream()
        self.film = None
        if self.episode.decisions and not self.steps.is_last[0]:
            self._list("stopped")
        self._rollout.stop()

    def _list(self, outcome: str) -> None:
        episode = self.episode
        self.ended += 1
        self.episodes.append(
            {
                "number": self.ended,
                "seed": episode.seed,
                "level": self.level,
                "model": self.model,
                "by": " + ".join(self._players),
                "outcome": outcome,
                "return": round(episode.total_reward, 1),
                "best_x": episode.info["best_x"],
                "decisions": episode.decisions,
            }
        )

    # The dream

    def look_ahead(self) -> None:
        """Dreams the coming decisions, from the game or from the dream, the first of them as decided."""
        state, action = (self.dream.state, self.dream.action) if self.dream else (self.policy.state, self.action)
        states, actions = self.mind.imagine(state, action, AHEAD, self.greedy)
        self.film = Film(actions, self.mind.think(states), self.history[-1]["step"])

    @property
    def film_age(self) -> int | None:
        """Steps since it was dreamt; None without one."""
        return None if self.film is None else self.history[-1]["step"] - self.film.step

    def enter_dream(self) -> None:
        """Plays on inside the world model from the present state.

        Raises:
            LiveError: the episode is over
        """
        if self.dream:
            return
        if self.steps.is_last[0]:
            raise LiveError("the episode is over, there is nothing to dream on from; step into the next one first")
        self.dream = Dream(
            self.env.snapshot(), self.policy.state, self.thoughts, self.action, self.steps.obs[0], self.episode.info
        )

    def leave_dream(self) -> None:
        """Back to the game as it was; without a dream nothing happens."""
        if self.dream:
            self.env.restore(self.dream.snapshot)
            self.dream, self.film = None, None

    def _dream_on(self) -> None:
        dream = self.dream
        if self.hands.on:
            dream.action = self.hands.action()
        reward = None
        if not dream.over:
            dream.obs, reward, terminated, truncated, dream.info = self.env.step(dream.action)
            dream.over = terminated or truncated
            dream.real_total += float(reward)
        dream.state = self.mind.step(dream.state, dream.action)
        dream.thoughts = self.mind.think(dream.state)
        dream.action = self.mind.choose(dream.state, self.greedy)
        dream.decisions += 1
        dream.total_reward += float(dream.thoughts.reward[0])
        self._remember(dream.thoughts, None if reward is None else float(reward), dream.decisions)

    def _remember(self, thoughts: Thoughts, reward: float | None, decision: int) -> None:
        self.history.append(
            {
                "step": self.history[-1]["step"] + 1 if self.history else 0,
                "decision": decision,
                "dreamt": self.dream is not None,
                "value": float(thoughts.value[0]),
                "reward": float(thoughts.reward[0]),
                "real_reward": reward,
                "goes_on": float(thoughts.goes_on[0]),
            }
        )
