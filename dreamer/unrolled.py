"""Products with weights, arranged for what is special here: recurrences, and inputs that are one-hot."""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What products with this weight are computed in: autocast's type where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def flat_one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(N, S) classes to (N, S*K) one-hots."""
    return (
        torch.zeros(*index.shape, classes, dtype=dtype, device=index.device)
        .scatter_(-1, index[..., None], 1)
        .flatten(1)
    )


class _OneHotProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, index: Tensor, probs: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, index)
        ctx.classes, ctx.probs_dtype = len(weight) // index.shape[-1], None if probs is None else probs.dtype
        if weight.is_cuda:
            return flat_one_hot(index, ctx.classes, weight.dtype) @ weight
        first_rows = torch.arange(0, len(weight), ctx.classes)
        return F.embedding_bag(index + first_rows, weight, mode="sum")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        weight, index = ctx.saved_tensors
        needs_weight, _, needs_probs = ctx.needs_input_grad
        return (
            flat_one_hot(index, ctx.classes, gradient.dtype).t() @ gradient if needs_weight else None,
            None,
            (gradient @ weight.t()).to(ctx.probs_dtype) if needs_probs else None,
        )


def one_hot_product(weight: Tensor, index: Tensor, probs: Tensor | None = None) -> Tensor:
    """one_hot(index) @ weight. A CPU adds up the S rows that the classes choose, K times less work than the product.

    Args:
        weight: (S*K, O)
        index: (N, S) int64
        probs: (N, S*K), of which the classes are samples: gets the one-hots' gradient, straight through

    Returns:
        (N, O)
    """
    return _OneHotProduct.apply(weight, index, probs)


class _LateGradient(torch.autograd.Function):
    """`known` as it is; its gradient, times inputs that are appended after this call, becomes the weight's."""

    @staticmethod
    def forward(ctx, known: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs, ctx.shape, ctx.dtype = inputs, weight.shape, weight.dtype
        return known.view_as(known)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x = torch.cat(ctx.inputs)
        if not x.is_floating_point():
            x = flat_one_hot(x, ctx.shape[0] // x.shape[-1], gradient.dtype)
        return gradient, (x.t() @ gradient.flatten(0, 1)).to(ctx.dtype), None


class Unrolled:
    """A product with the same weight at every step of a recurrence: y_t = known_t + x_t @ weight.

    Autograd would work out and add up a gradient of the weight for each step; this does it once, as one product over
    all steps.

    Args:
        weight: (I, O)
        known: (T, B, O), the share of the output that is known before the recurrence runs
    """

    def __init__(self, weight: Tensor, known: Tensor):
        self._weight, self._inputs = weight.detach().to(compute_dtype(weight)), []
        self._known = iter(_LateGradient.apply(known.to(self._weight.dtype), weight, self._inputs).unbind(0))

    def __call__(self, x: Tensor, probs: Tensor | None = None) -> Tensor:
        """y_t (B, O) of the next t, from x_t (B, I), or from classes (B, S) and their probabilities (B, I)."""
        if not x.is_floating_point():
            self._inputs.append(x)
            return next(self._known) + one_hot_product(self._weight, x, probs)
        x = x.to(self._weight.dtype)
        self._inputs.append(x.detach())
        return torch.addmm(next(self._known), x, self._weight)
