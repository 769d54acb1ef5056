"""The world model: what the agent learns from replay (sections 2.1 to 2.5 and 3.1)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import recurrence
from dreamer.config import LossConfig, ModelConfig
from dreamer.distributions import BUCKETS, OneHot, TwoHot
from dreamer.image_loss import image_loss
from dreamer.networks import MLP, Decoder, Encoder, Sizes, State, StateLinear, centered, tiles, untiled
from dreamer.rssm import RSSM, kl_loss
from dreamer.unrolled import compute_dtype


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue heads."""

    def __init__(self, config: ModelConfig, losses: LossConfig, actions: int):
        super().__init__()
        self.config, self.losses, self.actions = config, losses, actions
        self._constant: list[RSSM] = []  # in a list, since it is no part of what is learned and saved
        self.sizes = Sizes(config.stoch, config.classes, config.deter)
        self.encoder = Encoder(config.depth)
        self.rssm = RSSM(config, self.encoder.outputs, actions)
        self.decoder = Decoder(self.sizes, config.depth)
        self.reward_head = MLP(self.sizes, config.units, config.layers, BUCKETS, outscale=0.0)
        self.continue_head = MLP(self.sizes, config.units, config.layers, 1, outscale=1.0)

    def constant_rssm(self) -> RSSM:
        """The RSSM to imagine with: its weights as they are now, cast once instead of at every step."""
        dtype = compute_dtype(self.rssm.post_out.weight)
        if dtype == self.rssm.post_out.weight.dtype or recurrence.possible(self.rssm):
            return self.rssm
        if not self._constant:
            self._constant.append(copy.deepcopy(self.rssm).requires_grad_(False))
            for module in self._constant[0].modules():
                if isinstance(module, nn.Linear | StateLinear):
                    module.to(dtype)
        with torch.no_grad():
            torch._foreach_copy_(list(self._constant[0].parameters()), list(self.rssm.parameters()))
        return self._constant[0]

    def reward(self, state: State) -> TwoHot:
        return TwoHot(self.reward_head(state), self.config.buckets)

    def continue_logit(self, state: State) -> Tensor:
        """Of c = 1 - is_terminal, (...)."""
        return self.continue_head(state).squeeze(-1).float()

    def loss(
        self,
        obs: Tensor,
        action: Tensor,
        reward: Tensor,
        is_first: Tensor,
        is_terminal: Tensor,
        context: State | None = None,
        uniform: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], State]:
        """Negative log-likelihoods of image, reward and continuation plus the KL loss, mean over (B, T).

        Args:
            obs: (B, T, 64, 64, 3) uint8; action: (B, T, A) one-hot; the rest (B, T)
            context: the states before the first steps, (B, ...)
            uniform: variates that the states are drawn with, (B, T, S)

        Returns:
            the loss with gradients, its parts, and the posterior states (B, T, ...), detached
        """
        pixels = centered(obs)
        post, state = self.rssm.observe(self.encoder(pixels), action, is_first, context, uniform)
        prior = self.rssm.prior(state.deter)
        flat, target = state.map(lambda part: part.flatten(0, 1)), tiles(pixels).flatten(0, 1)
        parts = {
            "reward_loss": -self.reward(state).log_prob(reward),
            "continue_loss": F.binary_cross_entropy_with_logits(
                self.continue_logit(state), 1.0 - is_terminal.float(), reduction="none"
            ),
        }
        scales = {"reward_loss": self.losses.reward_scale, "continue_loss": self.losses.continue_scale}
        parts["kl_loss"], kl = kl_loss(
            post, prior, self.losses.free_nats, self.losses.dyn_scale, self.losses.rep_scale, self.config.unimix_ratio
        )
        assert all(part.shape == reward.shape for part in parts.values())
        image = image_loss(self.decoder, flat, target, self.losses.image_focus)
        parts = {"image_loss": image, **{name: part.mean() for name, part in parts.items()}}
        loss = torch.stack([scales.get(name, 1.0) * part for name, part in parts.items()]).sum()
        with torch.no_grad():
            unimix = self.config.unimix_ratio
            metrics = {
                "model_loss": loss.detach(),
                **{name: part.detach() for name, part in parts.items()},
                "kl_divergence": kl.mean(),
                "prior_entropy": OneHot(prior, unimix).entropy().sum(-1).mean(),
                "posterior_entropy": OneHot(post, unimix).entropy().sum(-1).mean(),
            }
        return loss, metrics, state.detach()

    @torch.no_grad()
    def open_loop(self, obs: Tensor, action: Tensor, is_first: Tensor, context: int = 5) -> Tensor:
        """What the model sees in `context` frames and imagines after them, given the actions.

        Args:
            obs: (B, T, 64, 64, 3) uint8; action: (B, T, A); is_first: (B, T)

        Returns:
            (B, T, 64, 64, 3) uint8: reconstructions, then predictions
        """
        now = slice(None, context)
        _, state = self.rssm.observe(self.encoder(centered(obs[:, now])), action[:, now], is_first[:, now])
        states = [state.map(lambda part, t=t: part[:, t]) for t in range(state.index.shape[1])]
        for action_t in action[:, context:].unbind(1):
            states.append(self.rssm.img_step(states[-1], action_t))
        return to_image(self.decoder(State.stacked(states, 1)))


def to_image(mean: Tensor) -> Tensor:
    """A decoder's output as uint8 images (..., 64, 64, 3), rounded and clipped."""
    return ((untiled(mean).float() + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
