"""The world model: what the agent learns from replay (sections 2.1 to 2.5 and 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer.config import LossConfig, ModelConfig
from dreamer.distributions import BUCKETS, OneHot, TwoHot
from dreamer.networks import MLP, Decoder, Encoder
from dreamer.rssm import RSSM, State, kl_loss


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue heads. Features are [z; h], F = S*K + D."""

    def __init__(self, config: ModelConfig, losses: LossConfig, actions: int):
        super().__init__()
        self.config, self.losses, self.actions = config, losses, actions
        self.features = config.stoch * config.classes + config.deter
        self.encoder = Encoder(config.depth)
        self.rssm = RSSM(config, self.encoder.outputs, actions)
        self.decoder = Decoder(self.features, config.depth)
        self.reward_head = MLP(self.features, config.units, config.layers, BUCKETS, outscale=0.0)
        self.continue_head = MLP(self.features, config.units, config.layers, 1, outscale=1.0)

    def reward(self, feat: Tensor) -> TwoHot:
        return TwoHot(self.reward_head(feat))

    def continue_logit(self, feat: Tensor) -> Tensor:
        """Of c = 1 - is_terminal, (...)."""
        return self.continue_head(feat).squeeze(-1).float()

    def loss(
        self, obs: Tensor, action: Tensor, reward: Tensor, is_first: Tensor, is_terminal: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], State]:
        """Negative log-likelihoods of image, reward and continuation plus the KL loss, mean over (B, T).

        Args:
            obs: (B, T, 64, 64, 3) uint8; action: (B, T, A) one-hot; the rest (B, T)

        Returns:
            the loss with gradients, its parts, and the posterior states (stoch, deter), (B, T, ...), detached
        """
        post, prior, stoch, deter = self.rssm.observe(self.encoder(obs), action, is_first)
        feat = torch.cat([stoch, deter], -1)
        parts = {
            "image_loss": ((self.decoder(feat).float() - obs.float() / 255) ** 2).sum((-3, -2, -1)),
            "reward_loss": -self.reward(feat).log_prob(reward),
            "continue_loss": F.binary_cross_entropy_with_logits(
                self.continue_logit(feat), 1.0 - is_terminal.float(), reduction="none"
            ),
        }
        scales = {"reward_loss": self.losses.reward_scale, "continue_loss": self.losses.continue_scale}
        parts["kl_loss"], kl = kl_loss(
            post, prior, self.losses.free_nats, self.losses.dyn_scale, self.losses.rep_scale, self.config.unimix_ratio
        )
        assert all(part.shape == reward.shape for part in parts.values())
        parts = {name: part.mean() for name, part in parts.items()}
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
        return loss, metrics, (stoch.detach(), deter.detach())

    @torch.no_grad()
    def open_loop(self, obs: Tensor, action: Tensor, is_first: Tensor, context: int = 5) -> Tensor:
        """What the model sees in `context` frames and imagines after them, given the actions.

        Args:
            obs: (B, T, 64, 64, 3) uint8; action: (B, T, A); is_first: (B, T)

        Returns:
            (B, T, 64, 64, 3) uint8: reconstructions, then predictions
        """
        now = slice(None, context)
        *_, stoch, deter = self.rssm.observe(self.encoder(obs[:, now]), action[:, now], is_first[:, now])
        feats = [torch.cat([stoch, deter], -1)]
        state = (stoch[:, -1], deter[:, -1])
        for action_t in action[:, context:].unbind(1):
            state = self.rssm.img_step(state, action_t)
            feats.append(torch.cat(state, -1).unsqueeze(1))
        return to_image(self.decoder(torch.cat(feats, 1)))


def to_image(mean: Tensor) -> Tensor:
    """A decoder's output as uint8 pixels, rounded and clipped."""
    return (mean.float() * 255).round().clamp(0, 255).to(torch.uint8)
