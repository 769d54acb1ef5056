"""An update's gradients (section 4), found for some rows of the batch by one process."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dreamer.actor_critic import ActorCritic, Dream
from dreamer.networks import State
from dreamer.world_model import WorldModel

Gradients = dict[str, list[Tensor]]  # by network, in the order of its parameters
Metrics = dict[str, Tensor]  # scalars


def mixed(device: torch.device, precision: str) -> torch.autocast:
    """Products in bfloat16, if that is the precision; each casts for itself."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


class Rows(NamedTuple):
    """Rows of a batch, and what is drawn for them: B rows, T steps, of which imagination starts at N, for H steps."""

    obs: Tensor  # (B, T, 64, 64, 3) uint8
    action: Tensor  # (B, T, A) one-hot
    reward: Tensor  # (B, T)
    is_first: Tensor  # (B, T) bool
    is_terminal: Tensor  # (B, T) bool
    stoch: Tensor  # (B, S), with deter (B, D) the state before the first step
    deter: Tensor
    uniform_post: Tensor  # (B, T, S)
    uniform_action: Tensor  # (B, N, H)
    uniform_prior: Tensor  # (B, N, H, S)

    def part(self, rows: slice) -> "Rows":
        return Rows(*(each[rows] for each in self))


@dataclass
class Learning:
    """The phases of an update, each with the weights as they are by then: learn, dream, behave.

    Args:
        model: that imagines
        learner: the model that learns; the same, or one whose moving average imagines
        precision: of the products, "float32" or "bfloat16"
    """

    model: WorldModel
    learner: WorldModel
    actor_critic: ActorCritic
    precision: str

    def __post_init__(self):
        self.networks = {
            "model": self.learner,
            "actor": self.actor_critic.actor,
            "critic": self.actor_critic.critic,
        }
        self._parameters = {name: list(network.parameters()) for name, network in self.networks.items()}

    def autocast(self) -> torch.autocast:
        return mixed(next(self.model.parameters()).device, self.precision)

    def learn(self, rows: Rows, share: float = 1.0) -> tuple[Gradients, Metrics, tuple[Tensor, Tensor]]:
        """Of the world model's loss, times `share`.

        Returns:
            gradients, metrics, and the posterior states: classes (B, T, S) and h (B, T, D)
        """
        self._rows, self._share = rows, share
        context = State(rows.stoch.long(), rows.deter)
        with self.autocast():
            loss, metrics, self._states = self.learner.loss(*rows[:5], context, rows.uniform_post)
        return *self._shares({"model": loss}, metrics), self._states[:2]

    def dream(self) -> tuple[Tensor, Tensor]:
        """Imagines from the states that `learn` found. Returns λ-returns and values, (H, B * N)."""
        rows = self._rows
        start = self._states.map(lambda x: x[:, : rows.uniform_action.shape[1]].flatten(0, 1))
        noise = (each.flatten(0, 1).transpose(0, 1) for each in (rows.uniform_action, rows.uniform_prior))
        with self.autocast():
            self._dream: Dream = self.actor_critic.dream(self.model, self.model.constant_rssm(), start, *noise)
        return self._dream.returns.detach(), self._dream.value.detach()

    def behave(self, unit: tuple[Tensor, Tensor]) -> tuple[Gradients, Metrics]:
        """Of actor's and critic's loss on what was dreamt, times `share`."""
        with self.autocast():
            actor_loss, critic_loss, metrics = self.actor_critic.losses(self._dream, unit)
        found = self._shares({"actor": actor_loss, "critic": critic_loss}, metrics)
        del self._rows, self._states, self._dream
        return found

    def _shares(self, losses: dict[str, Tensor], metrics: Metrics) -> tuple[Gradients, Metrics]:
        gradients = {
            name: list(torch.autograd.grad(self._share * loss, self._parameters[name], retain_graph=len(losses) > 1))
            for name, loss in losses.items()
        }
        return gradients, {name: self._share * value for name, value in metrics.items()}
