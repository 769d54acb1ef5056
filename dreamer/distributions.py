"""Symlog, and the two discrete distributions every head is made of (sections 5.1, 5.2, 5.4 and 5.7)."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BUCKETS = 255
LIMIT = 20.0  # buckets lie linearly in [-LIMIT, LIMIT] of symlog space


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(|x| + 1), any shape."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Inverse of `symlog`: sign(x) (exp(|x|) - 1), any shape."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


@functools.lru_cache
def _buckets(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.linspace(-LIMIT, LIMIT, BUCKETS, dtype=torch.float64).to(device=device, dtype=dtype)


def _full(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: probabilities and their logarithms are never computed in less."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class TwoHot:
    """A scalar as a categorical over 255 buckets in symlog space (section 5.2).

    Args:
        logits: (..., 255)
    """

    def __init__(self, logits: Tensor):
        self.logits = _full(logits)

    @functools.cached_property
    def _log_probs(self) -> Tensor:
        return F.log_softmax(self.logits, -1)

    def mean(self) -> Tensor:
        """symexp of the expected bucket, (...)."""
        return symexp(F.softmax(self.logits, -1) @ _buckets(self.logits.dtype, self.logits.device))

    def log_prob(self, x: Tensor) -> Tensor:
        """Cross-entropy with the two buckets around symlog(x), (...) from x of shape (...).

        A target beyond the last bucket counts as the last bucket.
        """
        position = (symlog(x.to(self.logits.dtype)).clamp(-LIMIT, LIMIT) + LIMIT) * ((BUCKETS - 1) / (2 * LIMIT))
        below = position.floor().clamp(max=BUCKETS - 2)
        weight_above = position - below
        index = below.nan_to_num(0.0).long().unsqueeze(-1)  # NaN stays in the weight, and no index goes astray
        low, high = (self._log_probs.gather(-1, near).squeeze(-1) for near in (index, index + 1))
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
