"""λ-returns, their weights and their scale (section 3.2)."""

import torch
from torch import Tensor, nn


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float) -> Tensor:
    """V_λ(s_t) = r_t + γ_t [(1 - λ) V(s_{t+1}) + λ V_λ(s_{t+1})], computed backwards (section 3.2.1).

    Args:
        reward: (H, ...) time first
        value: (H, ...) of the states s_0 to s_{H-1}
        discount: (H, ...) continuation times base discount
        bootstrap: (...) value of the state after the last
        lambda_: 0 is one-step TD, 1 Monte Carlo

    Returns:
        (H, ...)
    """
    next_value = torch.cat([value[1:], bootstrap[None]])
    one_step = reward + discount * next_value * (1 - lambda_)
    returns = []
    following = bootstrap
    for t in reversed(range(len(reward))):
        following = one_step[t] + discount[t] * lambda_ * following
        returns.append(following)
    return torch.stack(returns[::-1])


def discount_weights(discount: Tensor) -> Tensor:
    """w_0 = 1, w_t = γ_0 ... γ_{t-1} (section 3.2.2): how likely imagination gets to t, discounted. (H, ...)."""
    return torch.cat([torch.ones_like(discount[:1]), discount[:-1]]).cumprod(0)


class ReturnNormalizer(nn.Module):
    """Moving averages of two percentiles of the returns; their distance is the scale (section 3.2.2).

    Args:
        decay: of the moving averages, which start at zero
        low, high: the percentiles, in [0, 1]
    """

    def __init__(self, decay: float, low: float = 0.05, high: float = 0.95):
        super().__init__()
        self.decay = decay
        self.register_buffer("quantiles", torch.tensor([low, high], dtype=torch.float64), persistent=False)
        self.register_buffer("average", torch.zeros(2, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, returns: Tensor) -> tuple[Tensor, Tensor]:
        """Takes returns of any shape into account; gives (offset, scale), scalars, with scale at least 1."""
        now = torch.quantile(returns.detach().flatten(), self.quantiles.to(returns.dtype))
        self.average.lerp_(now.to(self.average.dtype), 1 - self.decay)
        low, high = self.average.to(returns.dtype)
        return low, (high - low).clamp(min=1.0)
