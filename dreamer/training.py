"""The loop of section 4: collect, update, yield what happened. The caller decides what to log, evaluate and save.

Emulators and updates work side by side. A round:

    policy acts with the weights as they are
        |-- environments step (their threads)
        |-- the updates that all decisions so far have earned, this round's too, on what replay holds: not yet this step
    the step is added to replay

So the outcome does not depend on which of the two takes longer, and between rounds no step is in flight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamer.agent import Agent
from dreamer.config import TrainingConfig
from dreamer.replay import DETER_SCALE, Replay
from dreamer.rollout import Episode, Rollout


@dataclass
class Counters:
    """Where training is. `debt` is the train ratio's: replayed time steps that the decisions so far have earned and the
    updates so far have not spent."""

    decisions: int = 0
    updates: int = 0
    episodes: int = 0
    debt: float = 0.0


@dataclass
class Progress:
    """One round of the loop, a decision of every environment and the updates it paid for; or one update before all."""

    counters: Counters
    episodes: list[Episode] = field(default_factory=list)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)  # one an update, scalars on the device


@dataclass
class Posterior:
    """The states that an update found for its batch, on their way from the device to replay."""

    origins: Sequence[tuple[str, int]]  # the batch's
    stoch: Tensor  # classes (B, T, S) uint8
    deter: Tensor  # (B, T, D) int8, DETER_SCALE times h
    arrived: torch.cuda.Event | None = None

    @classmethod
    def send(cls, origins: Sequence[tuple[str, int]], stoch: Tensor, deter: Tensor) -> "Posterior":
        """From classes (B, T, S) and h (B, T, D) on the device, which this does not wait for."""
        deter = (deter.float() * DETER_SCALE).round().clamp(-DETER_SCALE, DETER_SCALE)
        host = [part.to("cpu", non_blocking=True) for part in (stoch.to(torch.uint8), deter.to(torch.int8))]
        arrived = torch.cuda.Event() if stoch.is_cuda else None
        if arrived:
            arrived.record()
        return cls(origins, *host, arrived)

    def arrays(self) -> dict[str, Any]:
        """What `Replay.refresh` takes. Waits for the update that the states are from, for none after it."""
        if self.arrived:
            self.arrived.synchronize()
        return {"origins": self.origins, "stoch": self.stoch.numpy(), "deter": self.deter.numpy()}


class Training:
    """The state of one training run; `run` goes on from it, so a run cut anywhere between rounds can be continued.

    Args:
        rollout: of a policy of `agent`
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
        self._seeded = counters.decisions
        self._posterior: Posterior | None = None  # of the last update

    def run(self, decisions: int) -> Iterator[Progress]:
        """Updates on the seed data until there are `pretrain`, then rounds until there are `decisions` in all. Each
        decision earns `train_ratio` replayed time steps when it is taken, before its step arrives; an update spends
        batch_size * batch_length of them. What changes with time does so from the first of these rounds to the last."""
        price = self.config.batch_size * self.config.batch_length
        counters, anneal = self.counters, self.agent.anneal
        anneal(0.0)
        while counters.updates < self.config.pretrain and self.replay.starts(self.config.batch_length):
            metrics = [self._update()]
            counters.updates += 1
            yield Progress(counters, metrics=metrics)
        while counters.decisions < decisions:
            taken = self.rollout.launch()
            latents = self.rollout.policy.latents() if taken and self.replay.config.context else None
            counters.decisions += taken
            counters.debt += self.config.train_ratio * taken
            anneal((counters.decisions - self._seeded) / (decisions - self._seeded))
            metrics = []
            while counters.debt >= price and self.replay.starts(self.config.batch_length):
                metrics.append(self._update())
                counters.updates += 1
                counters.debt -= price
            steps, episodes = self.rollout.wait()
            self.replay.add(self.streams, steps, latents)
            counters.episodes += len(episodes)
            yield Progress(counters, episodes, metrics)

    def _update(self) -> dict[str, Tensor]:
        """The states of the update before are written to replay only now, when the device is at work on this one."""
        batch = self.replay.sample(self.config.batch_size, self.config.batch_length, self.rng)
        metrics, states = self.agent.update(batch)
        if self.replay.config.context:
            before, self._posterior = self._posterior, Posterior.send(batch.origins, states[0], states[1])
            if before:
                self.replay.refresh(**before.arrays())
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """All but the replay, whose chunks are files, and torch's random state."""
        return {
            "training": self.agent.training_state(),
            "rollout": self.rollout.state_dict(),
            "rng": self.rng.bit_generator.state,
            "counters": asdict(self.counters),
            "posterior": self._posterior and self._posterior.arrays(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.agent.load_training_state(state["training"])
        self.rollout.load_state_dict(state["rollout"])
        self.rng.bit_generator.state = state["rng"]
        self.counters = Counters(**state["counters"])
        self._posterior = state["posterior"] and Posterior(**state["posterior"])
