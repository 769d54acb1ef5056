"""The loss of the images that a decoder draws (section 3.1), in little memory."""

import torch
from torch import Tensor

from dreamer.kernels import Kernels
from dreamer.networks import Decoder, State, untiled

_CHUNK = 128  # images that a CPU draws at once


class ImageDistance(torch.autograd.Function):
    """Squared error of each image, (N,) float32, from its predicted mean and the image as `tiles`, (N, 32, 32, 2, 6).

    With `focus` p > 0, each pixel weighs as its own error to the power p, |e|^p, in units that leave the image's error
    what it is. Sprites of a dozen pixels are then not lost among thousands that are nearly right, and the model learns
    to see them sooner. The weights are constants.

    Keeps the weighted difference in the type of `mean`, and nothing else. If that is bfloat16, `kernels` find it, where
    there are any.
    """

    @staticmethod
    def forward(ctx, mean: Tensor, target: Tensor, focus: float, kernels: Kernels | None = None) -> Tensor:
        if kernels and mean.dtype == torch.bfloat16:
            distance, weighted = kernels.image_distance(mean, untiled(target), focus)
            ctx.save_for_backward(weighted)
            return distance
        with torch.autocast(mean.device.type, enabled=False):  # which would round the sums
            difference = mean - target
            if focus:
                pixels = difference.unflatten(-1, (2, 3))
                squares = pixels.square().sum(-1, keepdim=True)
                weights = squares ** (focus / 2)
                whole = torch.linalg.vecdot(weights.flatten(1), squares.flatten(1))
                unit = squares.flatten(1).sum(1) / whole.clamp(min=torch.finfo(torch.float32).tiny)
                weighted = (pixels * (weights * unit.view(-1, 1, 1, 1, 1, 1))).view_as(difference)
            else:
                weighted = difference
            ctx.save_for_backward(weighted.to(mean.dtype))
            return torch.linalg.vecdot(weighted.flatten(1), difference.flatten(1))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weighted,) = ctx.saved_tensors
        return weighted * (2 * gradient).to(weighted.dtype).view(-1, 1, 1, 1, 1), None, None, None


class _Chunked(torch.autograd.Function):
    """The mean error, whose gradients are found chunk by chunk as soon as it is drawn: what the decoder keeps for them
    all is a tenth of an update's memory."""

    @staticmethod
    def forward(
        ctx,
        decoder: Decoder,
        target: Tensor,
        focus: float,
        chunk: int,
        index: Tensor,
        deter: Tensor,
        probs: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        loss, of_state, of_weights = deter.new_zeros((), dtype=torch.float32), [], []
        for some in (slice(at, at + chunk) for at in range(0, len(index), chunk)):
            inputs = [part[some].detach().requires_grad_() for part in (deter, probs)]
            with torch.enable_grad():
                distance = ImageDistance.apply(
                    decoder(State(index[some], *inputs)), target[some], focus, decoder.kernels
                )
                error = distance.sum() / len(index)
            found = torch.autograd.grad(error, [*inputs, *weights])
            loss += error.detach()
            of_state.append(found[:2])
            if of_weights:
                torch._foreach_add_(of_weights, found[2:])
            else:
                of_weights = found[2:]
        ctx.gradients = [*map(torch.cat, zip(*of_state, strict=True)), *of_weights]
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, gradient)
        return None, None, None, None, None, *gradients


def image_loss(decoder: Decoder, state: State, target: Tensor, focus: float, chunk: int | None = None) -> Tensor:
    """Mean of `ImageDistance` over the images that `decoder` draws of states, (). To be differentiated once.

    Args:
        state: (N, ...), with probs
        target: (N, 32, 32, 2, 6), the images as `tiles`
        chunk: images drawn at once; all of them on a GPU, if it is not given
    """
    if not torch.is_grad_enabled():
        return ImageDistance.apply(decoder(state), target, focus, decoder.kernels).mean()
    if chunk is None:
        chunk = len(target) if target.is_cuda else _CHUNK
    return _Chunked.apply(decoder, target, focus, chunk, *state, *decoder.parameters())
