"""The agent: acts in the game, and updates all it has learned from one batch."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import kernels
from dreamer.actor_critic import ActorCritic
from dreamer.captured import Captured
from dreamer.config import AgentConfig, ComputeConfig, ConfigError
from dreamer.learning import Learning, Rows, mixed
from dreamer.networks import Decoder, NormSiLU, State, centered
from dreamer.optimizer import Optimizer
from dreamer.replay import Batch, Context
from dreamer.rssm import RSSM
from dreamer.team import Team
from dreamer.world_model import WorldModel


def pick_device(name: str) -> torch.device:
    """The device of `ComputeConfig.device`; "auto" is CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and not there
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "compute.device: cuda, but torch finds no CUDA device here; use auto or cpu, or check nvidia-smi"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Agent(nn.Module):
    """World model, actor and critic with their optimizers.

    Args:
        actions: A, the number of discrete actions
    """

    def __init__(self, config: AgentConfig, compute: ComputeConfig, actions: int):
        super().__init__()
        self.config, self.compute, self.actions = config, compute, actions
        self.device = pick_device(compute.device)
        self.world_model = WorldModel(config.model, config.losses, actions)
        self.actor_critic = ActorCritic(config.model, config.behavior, self.world_model.sizes, actions)
        self.to(self.device)
        self.updates = 0
        self._team: Team | None = None
        self._learn = self._update
        if compute.compile and self.device.type == "cuda":
            self._learn = Captured(self._update)
        elif compute.compile:
            for module in self.modules():
                if isinstance(module, NormSiLU | Decoder | RSSM):
                    module.kernels = kernels.load()

    @functools.cached_property
    def learner(self) -> WorldModel:
        """What the world model's loss changes. With `model_average` it is no part of the weights, which are its moving
        average, but of what training keeps, as the optimizers' moments are."""
        return copy.deepcopy(self.world_model) if self.config.behavior.model_average else self.world_model

    @functools.cached_property
    def learning(self) -> Learning:
        """Gradients by this process alone."""
        return Learning(self.world_model, self.learner, self.actor_critic, self.compute.precision)

    @contextmanager
    def team(self, size: int, initializer: Callable[[], None] | None = None) -> Iterator[Team]:
        """Within it, up to `size` processes share the updates, if the device is a CPU; see `Team`."""
        self._team = Team(self.learning, size if self.device.type == "cpu" else 1, initializer)
        try:
            yield self._team
        finally:
            self._team.close()
            self._team = None

    @functools.cached_property
    def optimizers(self) -> dict[str, Optimizer]:
        """By network. Made when first used: torch takes a second and a half over its first optimizer, in which it loads
        its compiler, and who only plays needs none."""
        config = self.config.optimizers
        return {
            "model": Optimizer(self.learner, config.model),
            "actor": Optimizer(self.actor_critic.actor, config.actor),
            "critic": Optimizer(self.actor_critic.critic, config.critic),
        }

    def anneal(self, done: float) -> None:
        """Sets what changes with time, when `done` of the training, 0 to 1, is over: learning rates and the entropy's
        weight."""
        self.actor_critic.anneal(done)
        for optimizer in self.optimizers.values():
            optimizer.scale_lr(self.config.optimizers.lr_scale(done))

    def autocast(self) -> torch.autocast:
        return mixed(self.device, self.compute.precision)

    def one_hot(self, action: Tensor) -> Tensor:
        """Indices (...) to (..., A) float; NO_ACTION becomes zeros."""
        return F.one_hot(action + 1, self.actions + 1)[..., 1:].float()

    def update(self, batch: Batch) -> tuple[dict[str, Tensor], State]:
        """One gradient step of world model, actor and critic each (section 4). No sync with the device.

        Returns:
            metrics, scalars on the device; and the posterior states: classes (B, T, S) int64 and h (B, T, D)
        """
        model = self.config.model
        context = batch.context or Context.unknown(len(batch.obs), model.stoch, model.deter)
        parts = [batch.obs, batch.action, batch.reward, batch.is_first, batch.is_terminal]
        parts += [context.stoch, context.deter, context.known]
        metrics, states = self._learn(*map(self._to_device, parts))
        self.updates += 1
        self.actor_critic.update_slow_critic(self.updates)
        self._average()
        return metrics, State(*states)

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the world model towards the learner: their plain mean at first, so that it forgets how it began."""
        if kept := self.config.behavior.model_average:
            share = max(1 - kept, 1 / self.updates)
            torch._foreach_lerp_(list(self.world_model.parameters()), list(self.learner.parameters()), share)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _update(
        self,
        obs: Tensor,
        action: Tensor,
        reward: Tensor,
        is_first: Tensor,
        is_terminal: Tensor,
        stoch: Tensor,
        deter: Tensor,
        known: Tensor,
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """All of `update` that happens on the device."""
        model, behavior = self.config.model, self.config.behavior
        batch, length = is_first.shape
        is_first = torch.cat([is_first[:, :1] | ~known[:, None], is_first[:, 1:]], 1)
        # Drawn here for all rows, so that it does not matter which process works on which.
        uniform_post = torch.rand(batch, length, model.stoch, device=self.device)
        shape = behavior.imag_horizon, batch, min(behavior.imag_starts or length, length)
        uniform_action = torch.rand(shape, device=self.device).movedim(0, 2)
        uniform_prior = torch.rand(*shape, model.stoch, device=self.device).movedim(0, 2)
        noise = uniform_post, uniform_action, uniform_prior
        rows = Rows(obs, self.one_hot(action), reward, is_first, is_terminal, stoch, deter, *noise)
        team = self._team or self.learning
        gradients, metrics, states = team.learn(rows)
        metrics["model_grad_norm"] = self.optimizers["model"].step(gradients["model"])
        unit = self.actor_critic.unit(*team.dream())
        gradients, measured = team.behave(unit)
        metrics.update(measured)
        for name in ("actor", "critic"):
            metrics[f"{name}_grad_norm"] = self.optimizers[name].step(gradients[name])
        return metrics, states

    def policy(self, greedy: bool = False) -> "AgentPolicy":
        """A policy with a memory of its own. Greedy takes the modes of latent and action, else both are sampled."""
        return AgentPolicy(self, greedy)

    def open_loop(self, batch: Batch, context: int = 5) -> np.ndarray:
        """`WorldModel.open_loop` of a batch, (B, T, 64, 64, 3) uint8."""
        with self.autocast():
            prediction = self.world_model.open_loop(
                self._to_device(batch.obs),
                self.one_hot(self._to_device(batch.action)),
                self._to_device(batch.is_first),
                context,
            )
        return prediction.cpu().numpy()

    def training_state(self) -> dict[str, Any]:
        """Weights, optimizers and counter: all that the next update depends on but the random state."""
        return {
            "weights": self.state_dict(),
            "learner": self.learner.state_dict() if self.learner is not self.world_model else None,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "updates": self.updates,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state["weights"])
        if state["learner"]:
            self.learner.load_state_dict(state["learner"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.updates = state["updates"]


class AgentPolicy:
    """`dreamer.rollout.Policy` of an agent: keeps the latent state of N environments between decisions."""

    def __init__(self, agent: Agent, greedy: bool):
        self.agent, self.greedy = agent, greedy
        self.state: State | None = None  # of N environments
        self.action: Tensor | None = None  # (N, A): the last decision

    @torch.no_grad()
    def __call__(self, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        agent, n = self.agent, len(obs)
        if self.state is not None and len(self.action) != n:
            self.state = None
        if self.state is None:
            self.action = torch.zeros(n, agent.actions, device=agent.device)
        with agent.autocast():
            embed = agent.world_model.encoder(centered(torch.as_tensor(obs, device=agent.device)))
            first = torch.as_tensor(is_first, device=agent.device)
            logits, state = agent.world_model.rssm.observe(
                embed[:, None], self.action[:, None], first[:, None], self.state
            )
            index = logits.argmax(-1) if self.greedy else state.index
            self.state = State(index[:, 0], state.deter[:, 0])
            policy = agent.actor_critic.policy(self.state)
            self.action = policy.mode() if self.greedy else policy.sample()
        return self.action.argmax(-1).cpu().numpy()

    def latents(self) -> tuple[np.ndarray, np.ndarray]:
        """The states after the last decision: classes (N, S) uint8 and h (N, D) float32."""
        return self.state.index.to(torch.uint8).cpu().numpy(), self.state.deter.float().cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state and tuple(self.state[:2]), "action": self.action}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        to_device = lambda value: value if value is None else value.to(self.agent.device)  # noqa: E731
        self.state = state["state"] and State(*map(to_device, state["state"]))
        self.action = to_device(state["action"])
