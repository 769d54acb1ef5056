"""The loop of section 4: collect, update, yield what happened. The caller decides what to log, evaluate and save."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from dreamer.agent import Agent
from dreamer.config import TrainingConfig
from dreamer.replay import Replay
from dreamer.rollout import Episode, Rollout


@dataclass
class Counters:
    """Where training is. `debt` is the train ratio's: replayed time steps that the decisions so far have earned."""

    decisions: int = 0
    updates: int = 0
    episodes: int = 0
    debt: float = 0.0


@dataclass
class Progress:
    """One round of the loop: a decision of every environment and the updates it paid for."""

    counters: Counters
    episodes: list[Episode] = field(default_factory=list)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)  # one an update, scalars on the device


class Training:
    """The state of one training run; `run` goes on from it, so a run cut anywhere between rounds can be continued.

    Args:
        streams: the replay's stream for each of the rollout's environments
        rng: draws the batches
        counters: `decisions` may start above zero, to count data that were collected before
    """

    def __init__(
        self,
        agent: Agent,
        replay: Replay,
        rollout: Rollout,
        config: TrainingConfig,
        streams: list[str],
        rng: np.random.Generator,
        counters: Counters,
    ):
        self.agent, self.replay, self.rollout, self.config = agent, replay, rollout, config
        self.streams, self.rng, self.counters = streams, rng, counters

    def run(self, decisions: int) -> Iterator[Progress]:
        """Rounds until there are `decisions` in all. Each decision earns `train_ratio` replayed time steps, an update
        spends batch_size * batch_length of them."""
        price = self.config.batch_size * self.config.batch_length
        counters = self.counters
        while counters.decisions < decisions:
            steps, episodes, taken = self.rollout.step()
            self.replay.add(self.streams, steps)
            counters.decisions += taken
            counters.episodes += len(episodes)
            counters.debt += self.config.train_ratio * taken
            metrics = []
            while counters.debt >= price and self.replay.starts(self.config.batch_length):
                batch = self.replay.sample(self.config.batch_size, self.config.batch_length, self.rng)
                metrics.append(self.agent.update(batch))
                counters.updates += 1
                counters.debt -= price
            yield Progress(counters, episodes, metrics)

    def state_dict(self) -> dict[str, Any]:
        """All but the replay's chunks, which are files, and torch's random state."""
        return {
            "training": self.agent.training_state(),
            "rollout": self.rollout.state_dict(),
            "rng": self.rng.bit_generator.state,
            "counters": asdict(self.counters),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.agent.load_training_state(state["training"])
        self.rollout.load_state_dict(state["rollout"])
        self.rng.bit_generator.state = state["rng"]
        self.counters = Counters(**state["counters"])
