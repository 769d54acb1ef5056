"""The recurrent state-space model (section 2.2) and its KL loss (section 3.1.4).

Shapes: B batch, T time, A actions, D deter, S categoricals, K classes, E embed.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import recurrence
from dreamer.config import ModelConfig
from dreamer.distributions import OneHot
from dreamer.kernels import Kernels
from dreamer.networks import NORM_EPS, Dense, NormSiLU, State, StateLinear, init_weights
from dreamer.unrolled import Unrolled


class GRUCell(nn.Module):
    """GRU with LayerNorm over its three gates; the update gate starts at -1, so that memory lasts."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.linear = nn.Linear(inputs + units, 3 * units, bias=False)
        self.norm = nn.LayerNorm(3 * units, NORM_EPS)

    def forward(self, x: Tensor, deter: Tensor, linear: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """h_t (B, D) from x_t (B, I) and h_{t-1}. `linear` takes the place of the layer's own inside a recurrence."""
        gates = (linear or self.linear)(torch.cat([x, deter.to(x.dtype)], -1))
        reset, candidate, update = self.norm(gates).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(deter, candidate.to(deter.dtype), torch.sigmoid(update - 1).to(deter.dtype))


class RSSM(nn.Module):
    """
    h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}])      recurrent
    p(z_t | h_t)                                prior
    q(z_t | h_t, e_t)                           posterior
    """

    kernels: Kernels | None = None  # those of the CPU, where they are asked for

    def __init__(self, config: ModelConfig, embed: int, actions: int):
        super().__init__()
        self.config = config
        self.groups = (config.stoch, config.classes)
        stoch = config.stoch * config.classes
        self.input = StateLinear(*self.groups, actions, config.hidden)
        self.input_norm = NormSiLU(config.hidden)
        self.cell = GRUCell(config.hidden, config.deter)
        self.prior_layers = nn.Sequential(Dense(config.deter, config.hidden), nn.Linear(config.hidden, stoch))
        # The posterior's first layer takes [h; e]. Its halves are kept apart: the embedding's share of all time steps
        # is one product outside the recurrence.
        self.post_deter = nn.Linear(config.deter, config.hidden, bias=False)
        self.post_embed = nn.Linear(embed, config.hidden, bias=False)
        self.post_norm = NormSiLU(config.hidden)
        self.post_out = nn.Linear(config.hidden, stoch)
        init_weights(self)
        for half in (self.post_deter, self.post_embed):
            joint = (half.in_features + half.out_features) / (config.deter + embed + config.hidden)
            init_weights(half, joint)
        # Sharp from the start, z is a hash of what the encoder sees, which the decoder can learn to read at once; else
        # each has to wait for the other.
        init_weights(self.post_out, config.posterior_scale**2)
        if config.initial == "learned":
            self.initial_deter = nn.Parameter(torch.zeros(config.deter))
        else:
            self.register_buffer("initial_deter", torch.zeros(config.deter))

    def initial(self) -> tuple[Tensor, Tensor]:
        """The state before the first step, z (S*K,) and h (D,): tanh of a learned vector and the prior's mode there, or
        zeros."""
        deter = torch.tanh(self.initial_deter)
        if self.config.initial == "zero":
            return deter.new_zeros(math.prod(self.groups)), deter
        return OneHot(self.prior(deter), self.config.unimix_ratio).mode().flatten(), deter

    def prior(self, deter: Tensor) -> Tensor:
        """Logits of p(z | h), (..., D) to (..., S, K)."""
        return self.prior_layers(deter).unflatten(-1, self.groups)

    def img_step(self, state: State, action: Tensor, uniform: Tensor | None = None) -> State:
        """One step without an observation: z from the prior. Action (N, A), uniform variates (N, S)."""
        x = self.input(state.index, action, state.probs)
        deter = self.cell(self.input_norm(x), state.deter)
        return self._sampled(self.prior(deter), deter, uniform)

    def _sampled(self, logits: Tensor, deter: Tensor, uniform: Tensor | None = None) -> State:
        z = OneHot(logits, self.config.unimix_ratio)
        return State(z.draw(uniform), deter, z.probs.flatten(-2) if z.probs.requires_grad else None)

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor,
        state: State | None = None,
        uniform: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Runs along sequences. Where `is_first`, the past is the initial state and no action.

        Args:
            embed: (B, T, E), action: (B, T, A) the one that led to each step, is_first: (B, T) bool
            state: before the first step, (B, ...); the initial one if absent
            uniform: variates that z is drawn with, (B, T, S)

        Returns:
            the posterior's logits (B, T, S, K) and states (B, T, ...)
        """
        batch, length = is_first.shape
        if state is None:
            is_first = torch.cat([torch.ones_like(is_first[:, :1]), is_first[:, 1:]], 1)
            index = torch.zeros(batch, self.groups[0], dtype=torch.long, device=embed.device)
            state = State(index, embed.new_zeros(batch, self.config.deter))
        if uniform is None:
            uniform = torch.rand(batch, length, self.groups[0], device=embed.device)
        known_x, known_post = F.linear(action, self.input.rest), self.post_embed(embed)
        if length > 1 and recurrence.possible(self):
            return recurrence.observe(self, known_x, known_post, is_first, state, uniform)
        stoch, initial_deter = self.initial()
        initial_x = stoch @ self.input.stoch
        time_first = lambda x: x.transpose(0, 1)  # noqa: E731
        read_z = Unrolled(self.input.stoch, time_first(known_x))
        gates = Unrolled(self.cell.linear.weight.t(), embed.new_zeros(length, batch, 3 * self.config.deter))
        read_h = Unrolled(self.post_deter.weight.t(), time_first(known_post))
        out = Unrolled(self.post_out.weight.t(), self.post_out.bias.expand(length, batch, -1))
        index, deter, probs = state
        deter = deter.to(initial_deter.dtype)
        states, posts = [], []
        for first, uniform_t in zip(is_first.unsqueeze(-1).unbind(1), uniform.unbind(1), strict=True):
            x = read_z(index, probs)
            x = torch.where(first, initial_x.to(x.dtype), x)
            deter = self.cell(self.input_norm(x), torch.where(first, initial_deter, deter), gates)
            logits = out(self.post_norm(read_h(deter))).unflatten(-1, self.groups)
            index, deter, probs = self._sampled(logits, deter, uniform_t)
            states.append(State(index, deter, probs))
            posts.append(logits)
        found = State.stacked(states, 1)
        return torch.stack(posts, 1), found._replace(deter=found.deter.to(posts[0].dtype))


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
