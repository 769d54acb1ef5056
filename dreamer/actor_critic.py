"""Actor and critic, learned in imagination (sections 2.6, 2.7 and 3.2)."""

import copy

import torch
from torch import Tensor, nn

from dreamer.config import BehaviorConfig, ModelConfig
from dreamer.distributions import BUCKETS, OneHot, TwoHot
from dreamer.networks import MLP, Sizes, State
from dreamer.returns import ReturnNormalizer, discount_weights, lambda_return
from dreamer.world_model import WorldModel


class ActorCritic(nn.Module):
    """Policy, value and the value's slow copy, of states [z; h]. H horizon, N starts, A actions."""

    def __init__(self, model: ModelConfig, config: BehaviorConfig, sizes: Sizes, actions: int):
        super().__init__()
        self.config, self.unimix = config, model.unimix_ratio
        self.actor = MLP(sizes, model.units, model.layers, actions, outscale=1.0)
        self.critic = MLP(sizes, model.units, model.layers, BUCKETS, outscale=0.0)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.normalizer = ReturnNormalizer(config.return_decay)

    def policy(self, state: State) -> OneHot:
        return OneHot(self.actor(state), self.unimix)

    def imagine(self, world_model: WorldModel, start: State, constant: bool) -> tuple[State, Tensor, Tensor]:
        """Follows the policy inside the world model.

        Args:
            start: N states
            constant: the states take no gradient; the logits do, always

        Returns:
            states s_0 to s_H, (H + 1, N, ...), actions a_0 to a_{H-1} and the policy's logits of them, (H, N, A)
        """
        rssm, horizon = world_model.constant_rssm(), self.config.imag_horizon
        actor = self.actor.unrolled(horizon, len(start.index))
        states, actions, logits = [start], [], []
        for _ in range(horizon):
            # The policy is a function of the state's value, not of how it came about.
            logits.append(actor(states[-1].detach()))
            with torch.set_grad_enabled(not constant):
                actions.append(OneHot(logits[-1].detach() if constant else logits[-1], self.unimix).sample())
                states.append(rssm.img_step(states[-1], actions[-1]))
        index, deter, probs = zip(*states, strict=True)
        straight = None if probs[-1] is None else torch.stack([torch.zeros_like(probs[-1]), *probs[1:]])
        return State(torch.stack(index), torch.stack(deter), straight), torch.stack(actions), torch.stack(logits)

    def losses(self, world_model: WorldModel, start: State) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Actor loss, critic loss and metrics. Gradients are meant for the actor and the critic respectively, alone.

        With REINFORCE the imagined trajectory is a constant: no graph of it is kept, and the critic's one pass over it
        serves as baseline, bootstrap and prediction. The actor's pass is the one that imagined.
        """
        constant = self.config.imag_gradient == "reinforce"
        trajectory, action, logits = self.imagine(world_model, start, constant)
        with torch.set_grad_enabled(not constant):
            reward = world_model.reward(trajectory.map(lambda part: part[1:])).mean()
            discount = self.config.discount * torch.sigmoid(world_model.continue_logit(trajectory))
        states = trajectory.map(lambda part: part[:-1]).detach()
        prediction = TwoHot(self.critic(states))
        if constant:
            value = prediction.mean().detach()
            with torch.no_grad():
                bootstrap = TwoHot(self.critic(trajectory.map(lambda part: part[-1]))).mean()
        else:
            *value, bootstrap = TwoHot(self.critic(trajectory)).mean().unbind()
            value = torch.stack(value)
        returns = lambda_return(reward, value, discount[1:], bootstrap, self.config.discount_lambda)
        weights = discount_weights(discount.detach())[:-1]  # (H, N)
        actor_loss, actor_metrics = self._actor_loss(OneHot(logits, self.unimix), action, returns, value, weights)
        critic_loss = self._critic_loss(states, prediction, returns.detach(), weights)
        metrics = {
            **actor_metrics,
            "value_loss": critic_loss.detach(),
            "imag_reward": reward.detach().mean(),
            "imag_return": returns.detach().mean(),
            "imag_value": value.detach().mean(),
        }
        return actor_loss, critic_loss, metrics

    def _actor_loss(
        self, policy: OneHot, action: Tensor, returns: Tensor, value: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Section 3.2.2. All three estimators see the same advantage, in units of max(1, S), so that the entropy's
        weight means the same for each."""
        _, scale = self.normalizer(returns)
        advantage = (returns - value) / scale
        reinforce = advantage.detach() * policy.log_prob(action.detach())
        mix = {"reinforce": 0.0, "dynamics": 1.0, "both": self.config.imag_gradient_mix}[self.config.imag_gradient]
        objective = mix * advantage + (1 - mix) * reinforce
        entropy = policy.entropy()
        loss = -(weights * objective + self.config.entropy * entropy).mean()
        metrics = {
            "actor_loss": loss.detach(),
            "policy_entropy": entropy.detach().mean(),
            "return_scale": scale,
            "advantage_magnitude": advantage.detach().abs().mean(),
        }
        return loss, metrics

    def _critic_loss(self, states: State, prediction: TwoHot, returns: Tensor, weights: Tensor) -> Tensor:
        """Section 3.2.3: the critic's prediction towards the λ-returns, and towards its own slow copy."""
        loss = -prediction.log_prob(returns)
        if self.config.slow_target:
            with torch.no_grad():
                slow = TwoHot(self.slow_critic(states)).mean()
            loss = loss - prediction.log_prob(slow)
        return (weights * loss).mean()

    @torch.no_grad()
    def update_slow_critic(self, updates: int) -> None:
        """Moves the slow copy a fraction of the way, every `slow_target_update` updates (section 5.3)."""
        if updates % self.config.slow_target_update == 0:
            slow, fast = (list(net.parameters()) for net in (self.slow_critic, self.critic))
            torch._foreach_lerp_(slow, fast, self.config.slow_target_fraction)
