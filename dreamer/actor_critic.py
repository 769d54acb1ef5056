"""Actor and critic, learned in imagination (sections 2.6, 2.7 and 3.2)."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamer import recurrence
from dreamer.config import BehaviorConfig, ModelConfig, left_of
from dreamer.distributions import BUCKETS, OneHot, TwoHot
from dreamer.networks import MLP, Sizes, State
from dreamer.returns import ReturnNormalizer, discount_weights, lambda_return
from dreamer.rssm import RSSM
from dreamer.world_model import WorldModel


@dataclass
class Dream:
    """What was imagined from N starts, and what it is worth."""

    states: State  # s_0 to s_{H-1}, (H, N, ...), constants
    action: Tensor  # (H, N, A)
    policy: OneHot  # (H, N, A), where the actions come from
    prediction: TwoHot  # (H, N), the critic's
    reward: Tensor  # (H, N)
    value: Tensor  # (H, N)
    returns: Tensor  # (H, N)
    weights: Tensor  # (H, N), how likely imagination gets there, discounted


class ActorCritic(nn.Module):
    """Policy, value and the value's slow copy, of states [z; h]. H horizon, N starts, A actions."""

    def __init__(self, model: ModelConfig, config: BehaviorConfig, sizes: Sizes, actions: int):
        super().__init__()
        self.config, self.buckets = config, model.buckets
        self.actor = MLP(sizes, model.units, model.layers, actions, outscale=1.0)
        self.critic = MLP(sizes, model.units, model.layers, BUCKETS, outscale=0.0)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.normalizer = ReturnNormalizer(config.return_decay)
        # A tensor, since a captured graph reads what changes from memory.
        self.register_buffer("entropy_weight", torch.tensor(config.entropy), persistent=False)

    def policy(self, state: State) -> OneHot:
        return OneHot(self.actor(state), self.config.unimix_ratio)

    def value(self, state: State) -> TwoHot:
        """The critic's prediction of the return from there."""
        return TwoHot(self.critic(state), self.buckets)

    def imagine(
        self, rssm: RSSM, start: State, uniform_action: Tensor, uniform_state: Tensor, constant: bool
    ) -> tuple[State, Tensor, Tensor]:
        """Follows the policy inside the world model.

        Args:
            rssm: `WorldModel.constant_rssm`
            start: N states
            uniform_action, uniform_state: variates to draw with, (H, N) and (H, N, S)
            constant: the states take no gradient; the logits do, always

        Returns:
            states s_0 to s_H, (H + 1, N, ...), actions a_0 to a_{H-1} and the policy's logits of them, (H, N, A)
        """
        if constant and recurrence.possible(rssm, self.actor):
            unimix = self.config.unimix_ratio
            states, action = recurrence.imagine(rssm, self.actor, unimix, start, uniform_action, uniform_state)
            return states, action, self.actor(states.map(lambda part: part[:-1]))
        actor = self.actor.unrolled(*uniform_action.shape)
        states, actions, logits = [start], [], []
        for uniform_a, uniform_z in zip(uniform_action, uniform_state, strict=True):
            # The policy is a function of the state's value, not of how it came about.
            logits.append(actor(states[-1].detach()))
            with torch.set_grad_enabled(not constant):
                policy = OneHot(logits[-1].detach() if constant else logits[-1], self.config.unimix_ratio)
                actions.append(policy.sample(uniform_a))
                states.append(rssm.img_step(states[-1], actions[-1], uniform_z))
        if (probs := states[-1].probs) is not None:
            states[0] = start._replace(probs=torch.zeros_like(probs))  # a constant: no gradient arrives there
        return State.stacked(states, 0), torch.stack(actions), torch.stack(logits)

    def dream(
        self, world_model: WorldModel, rssm: RSSM, start: State, uniform_action: Tensor, uniform_state: Tensor
    ) -> Dream:
        """Imagines, and judges what was imagined; arguments as in `imagine`.

        With REINFORCE the imagined trajectory is a constant: no graph of it is kept, and the critic's one pass over it
        serves as baseline, bootstrap and prediction. The actor's pass is the one that imagined.
        """
        constant = self.config.imag_gradient == "reinforce"
        trajectory, action, logits = self.imagine(rssm, start, uniform_action, uniform_state, constant)
        with torch.set_grad_enabled(not constant):
            reward = world_model.reward(trajectory.map(lambda part: part[1:])).mean()
            discount = self.config.discount * torch.sigmoid(world_model.continue_logit(trajectory))
        states = trajectory.map(lambda part: part[:-1]).detach()
        prediction = self.value(states)
        if constant:
            value = prediction.mean().detach()
            with torch.no_grad():
                bootstrap = self.value(trajectory.map(lambda part: part[-1])).mean()
        else:
            *value, bootstrap = self.value(trajectory).mean().unbind()
            value = torch.stack(value)
        returns = lambda_return(reward, value, discount[1:], bootstrap, self.config.discount_lambda)
        weights = discount_weights(discount.detach())[:-1]
        policy = OneHot(logits, self.config.unimix_ratio)
        return Dream(states, action, policy, prediction, reward, value, returns, weights)

    @torch.no_grad()
    def unit(self, returns: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What advantages are measured from and in: (offset, scale), scalars, from all that was dreamt, each (H, N).

        "returns" is section 3.2.2. The spread of returns is mostly that between states: it grows with what the agent
        achieves, while what one action changes does not, so the entropy's weight grows by as much. "advantages" takes
        their own spread and mean, as is usual with PPO.
        """
        if self.config.normalize == "returns":
            return returns.new_zeros(()), self.normalizer(returns)[1]
        advantage = returns - value
        return advantage.mean(), self.normalizer(advantage)[1]

    def losses(self, dream: Dream, unit: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Actor loss, critic loss and metrics. Gradients are meant for the actor and the critic respectively, alone.

        Args:
            unit: of the advantages of all that was dreamt in this update
        """
        actor_loss, metrics = self._actor_loss(dream, *unit)
        critic_loss = self._critic_loss(dream)
        metrics.update(
            value_loss=critic_loss.detach(),
            imag_reward=dream.reward.detach().mean(),
            imag_return=dream.returns.detach().mean(),
            imag_value=dream.value.detach().mean(),
        )
        return actor_loss, critic_loss, metrics

    def _actor_loss(self, dream: Dream, offset: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Section 3.2.2. All three estimators see the same advantage, in units of max(1, S), so that the entropy's
        weight means the same for each."""
        advantage = (dream.returns - dream.value - offset) / scale
        reinforce = advantage.detach() * dream.policy.log_prob(dream.action.detach())
        mix = {"reinforce": 0.0, "dynamics": 1.0, "both": self.config.imag_gradient_mix}[self.config.imag_gradient]
        objective = mix * advantage + (1 - mix) * reinforce
        entropy = dream.policy.entropy()
        loss = -(dream.weights * objective + self.entropy_weight * entropy).mean()
        metrics = {
            "actor_loss": loss.detach(),
            "policy_entropy": entropy.detach().mean(),
            "return_scale": scale,
            "advantage_magnitude": advantage.detach().abs().mean(),
        }
        return loss, metrics

    def _critic_loss(self, dream: Dream) -> Tensor:
        """Section 3.2.3: the critic's prediction towards the λ-returns, and towards its own slow copy."""
        loss = -dream.prediction.log_prob(dream.returns.detach())
        if self.config.slow_target:
            with torch.no_grad():
                slow = TwoHot(self.slow_critic(dream.states), self.buckets).mean()
            loss = loss - dream.prediction.log_prob(slow)
        return (dream.weights * loss).mean()

    def anneal(self, done: float) -> None:
        """Sets the entropy's weight, when `done` of the training, 0 to 1, is over."""
        first, last = self.config.entropy, self.config.entropy_final
        left = left_of(self.config.entropy_decay, done)
        self.entropy_weight.fill_(first if last is None else last + (first - last) * left)

    @torch.no_grad()
    def update_slow_critic(self, updates: int) -> None:
        """Moves the slow copy a fraction of the way, every `slow_target_update` updates (section 5.3)."""
        if updates % self.config.slow_target_update == 0:
            slow, fast = (list(net.parameters()) for net in (self.slow_critic, self.critic))
            torch._foreach_lerp_(slow, fast, self.config.slow_target_fraction)
