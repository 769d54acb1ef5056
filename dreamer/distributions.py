"""Symlog, and the two discrete distributions every head is made of (sections 5.1, 5.2, 5.4 and 5.7)."""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BUCKETS = 255
LIMITS = {"symlog": 20.0, "symexp": 10.0}  # buckets lie in [-limit, limit] of symlog space
Spacing = Literal["symlog", "symexp"]


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(|x| + 1), any shape."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Inverse of `symlog`: sign(x) (exp(|x|) - 1), any shape."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


@functools.lru_cache
def _buckets(spacing: Spacing, dtype: torch.dtype, device: torch.device) -> Tensor:
    buckets = torch.linspace(-LIMITS[spacing], LIMITS[spacing], BUCKETS, dtype=torch.float64)
    return (buckets if spacing == "symlog" else symexp(buckets)).to(device=device, dtype=dtype)


def _full(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: probabilities and their logarithms are never computed in less."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class TwoHot:
    """A scalar as a categorical over 255 buckets.

    "symlog" (section 5.2) averages in symlog space, where the mean of what may be 400 or -15 with equal chances is 4.
    "symexp" (DreamerV3 of 2024) has its buckets at the same kind of places but averages the scalars themselves, here
    193. As a leftover probability far out then weighs much, its buckets end at 22,025 instead of 5e8.

    Args:
        logits: (..., 255)
    """

    def __init__(self, logits: Tensor, spacing: Spacing = "symlog"):
        self.logits, self.spacing = _full(logits), spacing

    @property
    def _places(self) -> Tensor:
        return _buckets(self.spacing, self.logits.dtype, self.logits.device)

    @functools.cached_property
    def _log_probs(self) -> Tensor:
        return F.log_softmax(self.logits, -1)

    def mean(self) -> Tensor:
        """The expected scalar, or symexp of its expected symlog, (...)."""
        probs = F.softmax(self.logits, -1)
        if self.spacing == "symlog":
            return symexp(probs @ self._places)
        half = BUCKETS // 2  # opposite buckets first, so that what is even in them is exactly zero
        return (probs[..., half + 1 :] - probs[..., :half].flip(-1)) @ self._places[half + 1 :]

    def log_prob(self, x: Tensor) -> Tensor:
        """Cross-entropy with the two buckets around x, (...) from x of shape (...).

        A target beyond the last bucket counts as the last bucket.
        """
        limit, x = LIMITS[self.spacing], x.to(self.logits.dtype)
        position = (symlog(x).clamp(-limit, limit) + limit) * ((BUCKETS - 1) / (2 * limit))
        below = position.floor().clamp(max=BUCKETS - 2)
        index = below.nan_to_num(0.0).long()  # NaN stays in the weight, and no index goes astray
        if self.spacing == "symlog":
            weight_above = position - below
        else:
            low, high = self._places[index], self._places[index + 1]
            weight_above = ((x - low) / (high - low)).clamp(0, 1)
        low, high = (self._log_probs.gather(-1, near.unsqueeze(-1)).squeeze(-1) for near in (index, index + 1))
        return torch.lerp(low, high, weight_above)


class OneHot:
    """Independent categoricals as one-hot vectors, mixed with the uniform distribution (section 5.7).

    Args:
        logits: (..., K)
        unimix: share of the uniform distribution in [0, 1]
    """

    def __init__(self, logits: Tensor, unimix: float = 0.0):
        probs = F.softmax(_full(logits), -1)
        self.probs = torch.lerp(probs, torch.full_like(probs, 1 / probs.shape[-1]), unimix) if unimix else probs

    @property
    def log_probs(self) -> Tensor:
        return torch.log(self.probs)

    def entropy(self) -> Tensor:
        """In nats, (...)."""
        return -(torch.xlogy(self.probs, self.probs)).sum(-1)

    def log_prob(self, one_hot: Tensor) -> Tensor:
        """(...) from one-hot vectors (..., K)."""
        return (self.log_probs * one_hot).sum(-1)

    def mode(self) -> Tensor:
        """The most likely class as a one-hot vector, with straight-through gradients."""
        return self._straight_through(self.probs.argmax(-1))

    def sample(self, uniform: Tensor | None = None) -> Tensor:
        """`draw` as one-hot vectors with straight-through gradients (section 5.4), (..., K)."""
        return self._straight_through(self.draw(uniform))

    def draw(self, uniform: Tensor | None = None) -> Tensor:
        """The class of a sample, (...) int64.

        Args:
            uniform: variates in [0, 1), (...), drawn here if absent; a sample is where the distribution function
                passes them. One a categorical is K times fewer than Gumbel noise takes.
        """
        below = self.probs.detach().cumsum(-1)
        if uniform is None:
            uniform = torch.rand(below.shape[:-1], dtype=below.dtype, device=below.device)
        at = uniform.to(below.dtype) * below[..., -1]
        return torch.searchsorted(below, at.unsqueeze(-1), right=True).squeeze(-1).clamp_(max=below.shape[-1] - 1)

    def _straight_through(self, index: Tensor) -> Tensor:
        one_hot = torch.zeros_like(self.probs).scatter_(-1, index.unsqueeze(-1), 1.0)
        return one_hot + (self.probs - self.probs.detach()) if self.probs.requires_grad else one_hot
