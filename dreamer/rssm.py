"""The recurrent state-space model (section 2.2) and its KL loss (section 3.1.4).

Shapes: B batch, T time, A actions, D deter, S categoricals, K classes, E embed. A state: stoch (B, S*K), deter (B, D).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer.config import ModelConfig
from dreamer.distributions import OneHot
from dreamer.networks import NORM_EPS, Dense, init_weights

State = tuple[Tensor, Tensor]


class GRUCell(nn.Module):
    """GRU with LayerNorm over its three gates; the update gate starts at -1, so that memory lasts."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.linear = nn.Linear(inputs + units, 3 * units, bias=False)
        self.norm = nn.LayerNorm(3 * units, NORM_EPS)

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        reset, candidate, update = self.norm(self.linear(torch.cat([x, deter], -1))).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(deter, candidate.to(deter.dtype), torch.sigmoid(update - 1).to(deter.dtype))


class RSSM(nn.Module):
    """
    h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}])      recurrent
    p(z_t | h_t)                                prior
    q(z_t | h_t, e_t)                           posterior
    """

    def __init__(self, config: ModelConfig, embed: int, actions: int):
        super().__init__()
        self.config = config
        self.groups = (config.stoch, config.classes)
        stoch = config.stoch * config.classes
        self.input = Dense(stoch + actions, config.hidden)
        self.cell = GRUCell(config.hidden, config.deter)
        self.prior_layers = nn.Sequential(Dense(config.deter, config.hidden), nn.Linear(config.hidden, stoch))
        # The posterior's first layer takes [h; e]. Its halves are kept apart: the embedding's share of all time steps
        # is one product outside the recurrence.
        self.post_deter = nn.Linear(config.deter, config.hidden, bias=False)
        self.post_embed = nn.Linear(embed, config.hidden, bias=False)
        self.post_norm = nn.LayerNorm(config.hidden, NORM_EPS)
        self.post_out = nn.Linear(config.hidden, stoch)
        init_weights(self)
        for half in (self.post_deter, self.post_embed):
            joint = (half.in_features + half.out_features) / (config.deter + embed + config.hidden)
            init_weights(half, joint)
        if config.initial == "learned":
            self.initial_deter = nn.Parameter(torch.zeros(config.deter))
        else:
            self.register_buffer("initial_deter", torch.zeros(config.deter))

    def initial(self, batch: int) -> State:
        """The state before the first step: tanh of a learned vector and the prior's mode there, or zeros."""
        deter = torch.tanh(self.initial_deter)
        if self.config.initial == "zero":
            stoch = deter.new_zeros(math.prod(self.groups))
        else:
            stoch = OneHot(self.prior(deter), self.config.unimix_ratio).mode().flatten()
        return stoch.expand(batch, -1), deter.expand(batch, -1)

    def recurrent(self, state: State, action: Tensor) -> Tensor:
        """h_t from (z_{t-1}, h_{t-1}) and a_{t-1} (B, A)."""
        stoch, deter = state
        return self.cell(self.input(torch.cat([stoch, action], -1)), deter)

    def prior(self, deter: Tensor) -> Tensor:
        """Logits of p(z | h), (..., D) to (..., S, K)."""
        return self.prior_layers(deter).unflatten(-1, self.groups)

    def posterior(self, deter: Tensor, embedded: Tensor) -> Tensor:
        """Logits of q(z | h, e), (..., S, K), from h and `post_embed(e)`."""
        return self.post_out(F.silu(self.post_norm(self.post_deter(deter) + embedded))).unflatten(-1, self.groups)

    def sample(self, logits: Tensor, uniform: Tensor | None = None) -> Tensor:
        """z as straight-through one-hots, (..., S, K) to (..., S*K)."""
        return OneHot(logits, self.config.unimix_ratio).sample(uniform).flatten(-2)

    def obs_step(
        self,
        state: State,
        action: Tensor,
        embedded: Tensor,
        is_first: Tensor,
        initial: State,
        uniform: Tensor | None = None,
    ) -> tuple[State, Tensor]:
        """One step with an observation. Where `is_first` (B,), the past is the initial state and no action.

        Returns:
            the state and the posterior's logits (B, S, K)
        """
        first = is_first.unsqueeze(-1)
        stoch, deter = (torch.where(first, start, past) for start, past in zip(initial, state, strict=True))
        deter = self.recurrent((stoch, deter), action.masked_fill(first, 0.0))
        logits = self.posterior(deter, embedded)
        return (self.sample(logits, uniform), deter), logits

    def img_step(self, state: State, action: Tensor, uniform: Tensor | None = None) -> State:
        """One step without an observation: z from the prior."""
        deter = self.recurrent(state, action)
        return self.sample(self.prior(deter), uniform), deter

    def observe(
        self, embed: Tensor, action: Tensor, is_first: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs along sequences.

        Args:
            embed: (B, T, E), action: (B, T, A) the one that led to each step, is_first: (B, T) bool
            state: before the first step; the initial one if absent

        Returns:
            post, prior: logits (B, T, S, K); stoch: (B, T, S*K); deter: (B, T, D)
        """
        batch, length = is_first.shape
        embedded = self.post_embed(embed)
        initial = self.initial(batch)
        state = initial if state is None else state
        uniform = torch.rand(length, batch, self.groups[0], device=embed.device)
        stochs, deters, posts = [], [], []
        steps = zip(action.unbind(1), embedded.unbind(1), is_first.unbind(1), uniform.unbind(0), strict=True)
        for action_t, embedded_t, first_t, uniform_t in steps:
            state, post = self.obs_step(state, action_t, embedded_t, first_t, initial, uniform_t)
            stochs.append(state[0])
            deters.append(state[1])
            posts.append(post)
        deter = torch.stack(deters, 1)
        return torch.stack(posts, 1), self.prior(deter), torch.stack(stochs, 1), deter


def kl_loss(
    post: Tensor, prior: Tensor, free_nats: float, dyn_scale: float, rep_scale: float, unimix: float
) -> tuple[Tensor, Tensor]:
    """dyn_scale max(KL(sg(q) || p), free) + rep_scale max(KL(q || sg(p)), free), section 3.1.4.

    The KL is of the unimixed distributions, summed over the categoricals; each (b, t) is clipped by itself.

    Args:
        post, prior: logits (B, T, S, K)

    Returns:
        loss and KL in nats, each (B, T); the KL carries no gradient
    """
    q, p = OneHot(post, unimix), OneHot(prior, unimix)
    log_q, log_p = q.log_probs, p.log_probs
    dyn = (q.probs.detach() * (log_q.detach() - log_p)).sum((-2, -1))
    rep = (q.probs * (log_q - log_p.detach())).sum((-2, -1))
    return dyn_scale * dyn.clamp(min=free_nats) + rep_scale * rep.clamp(min=free_nats), dyn.detach()
