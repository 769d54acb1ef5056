"""What an agent thinks of a state: what it looks like, what it is worth, what to do there, and what comes next.

Random numbers are its own: looking into an agent's mind changes nothing of what it does. Shapes: N states, H steps,
A actions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dreamer.agent import Agent
from dreamer.networks import State
from dreamer.world_model import to_image


@dataclass(frozen=True)
class Thoughts:
    """Of N states."""

    image: np.ndarray  # (N, 64, 64, 3) uint8, as the decoder draws them
    probs: np.ndarray  # (N, A) of the policy
    value: np.ndarray  # (N,) of the critic
    reward: np.ndarray  # (N,) on arriving there
    goes_on: np.ndarray  # (N,) probability that the episode does


class Mind:
    def __init__(self, agent: Agent, seed: int):
        self.agent = agent
        self._stoch = agent.config.model.stoch
        self._generator = torch.Generator(agent.device).manual_seed(seed)

    @torch.no_grad()
    def think(self, states: State) -> Thoughts:
        """Of states (N, ...)."""
        model, behavior = self.agent.world_model, self.agent.actor_critic
        with self.agent.autocast():
            found = (
                to_image(model.decoder(states)),
                behavior.policy(states).probs,
                behavior.value(states).mean(),
                model.reward(states).mean(),
                torch.sigmoid(model.continue_logit(states)),
            )
        return Thoughts(*(each.cpu().numpy() for each in found))

    @torch.no_grad()
    def choose(self, state: State, greedy: bool) -> int:
        """The policy's action in a state (1, ...)."""
        with self.agent.autocast():
            policy = self.agent.actor_critic.policy(state)
        return int((policy.mode() if greedy else policy.sample(self._uniform(1))).argmax())

    @torch.no_grad()
    def step(self, state: State, action: int) -> State:
        """The state (1, ...) that the model dreams after an action; drawn, as when the agent learns."""
        with self.agent.autocast():
            return self.agent.world_model.constant_rssm().img_step(
                state, self._one_hot(action), self._uniform(1, self._stoch)
            )

    @torch.no_grad()
    def imagine(self, state: State, action: int, steps: int, greedy: bool) -> tuple[State, np.ndarray]:
        """Dreams on from a state (1, ...): first `action`, then what the policy does there (`ActorCritic.imagine`).

        Returns:
            the H states that it comes to, (H, ...), and the actions that led there, (H,) int64
        """
        uniform_action, uniform_state = self._uniform(steps, 1), self._uniform(steps, 1, self._stoch)
        states, actions = [], []
        with self.agent.autocast():
            rssm = self.agent.world_model.constant_rssm()
            one_hot = self._one_hot(action)
            for k in range(steps):
                if k:
                    policy = self.agent.actor_critic.policy(state)
                    one_hot = policy.mode() if greedy else policy.sample(uniform_action[k])
                state = rssm.img_step(state, one_hot, uniform_state[k])
                states.append(state.map(lambda part: part[0]))
                actions.append(one_hot)
        return State.stacked(states, 0), torch.cat(actions).argmax(-1).cpu().numpy()

    def _one_hot(self, action: int) -> Tensor:
        return self.agent.one_hot(torch.tensor([action], device=self.agent.device))

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self.agent.device)
