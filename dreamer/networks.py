"""Encoder, decoder and heads (sections 2.1 and 2.3 to 2.7). Images are channels last throughout."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer.kernels import UNIT, Kernels
from dreamer.unrolled import Unrolled, compute_dtype, one_hot_product

NORM_EPS = 1e-3
IMAGE = 64
_STAGES = 4  # convolutions, each halving the image: 64 to 4
_CORNER = IMAGE >> _STAGES


class Sizes(NamedTuple):
    """Of a state."""

    stoch: int  # S categoricals
    classes: int  # K
    deter: int  # D


class State(NamedTuple):
    """The model's state [z; h]. z is kept as classes; where gradients pass through it, they go to `probs`."""

    index: Tensor  # (..., S) int64
    deter: Tensor  # (..., D)
    probs: Tensor | None = None  # (..., S*K)

    def map(self, function) -> "State":
        return State(*(part if part is None else function(part) for part in self))

    def detach(self) -> "State":
        return State(self.index, self.deter.detach())

    @staticmethod
    def stacked(states: "Sequence[State]", dim: int) -> "State":
        """All of them as one, along a new dimension."""
        parts = zip(*states, strict=True)
        return State(*(None if some[0] is None else torch.stack(some, dim) for some in parts))


def init_weights(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Truncated normal of variance scale / fan_avg, cut at two standard deviations; biases zero. In place.

    Source: the official DreamerV3 code; 0.8796 restores the variance that the cut takes away.
    """
    for layer in module.modules():
        if isinstance(layer, StateLinear):
            weights = [layer.stoch, layer.rest]
            fans = len(layer.stoch) + sum(layer.rest.shape)
        elif isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weights = [layer.weight]
            fans = sum(layer.weight.shape[:2]) * math.prod(layer.weight.shape[2:])
        else:
            continue
        std = math.sqrt(scale * 2 / fans) / 0.87962566103423978
        for weight in weights:
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std) if scale else nn.init.zeros_(weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


class StateLinear(nn.Module):
    """Linear of [z; rest], with z as classes: (..., S) and (..., R) to (..., outputs)."""

    def __init__(self, stoch: int, classes: int, rest: int, outputs: int, bias: bool = False):
        super().__init__()
        self.stoch = nn.Parameter(torch.empty(stoch * classes, outputs))
        self.rest = nn.Parameter(torch.empty(outputs, rest))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        init_weights(self)

    def forward(self, index: Tensor, rest: Tensor, probs: Tensor | None = None) -> Tensor:
        """`probs` (..., S*K) gets the gradient of z."""
        dtype, shape = compute_dtype(self.rest), index.shape[:-1]
        z = one_hot_product(self.stoch.to(dtype), index.flatten(0, -2), None if probs is None else probs.flatten(0, -2))
        if self.bias is not None:
            z = z + self.bias.to(dtype)
        y = torch.addmm(z, rest.flatten(0, -2).to(dtype), self.rest.to(dtype).t())
        return y.view(*shape, y.shape[-1])


class NormSiLU(nn.LayerNorm):
    """LayerNorm over the last dimension, then SiLU."""

    kernels: Kernels | None = None  # those of the CPU, where they are asked for

    def __init__(self, units: int):
        super().__init__(units, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.is_cuda:
            return F.silu(super().forward(x))
        if self.kernels and x.shape[-1] % UNIT == 0:
            return self.kernels.norm_silu(x, self.weight, self.bias, self.eps)
        return F.silu(super().forward(x.float())).to(x.dtype)  # see kernels.py on torch's bfloat16 gradients


class Dense(nn.Sequential):
    """Linear without bias, LayerNorm, SiLU: (..., inputs) to (..., units)."""

    def __init__(self, inputs: int, units: int):
        super().__init__(nn.Linear(inputs, units, bias=False), NormSiLU(units))


class MLP(nn.Module):
    """A state through `layers` of Linear, LayerNorm, SiLU and a linear output, (..., outputs).

    Args:
        outscale: of the output layer's initial weights; 0 makes the first predictions exactly uniform
    """

    def __init__(self, sizes: Sizes, units: int, layers: int, outputs: int, outscale: float):
        super().__init__()
        self.input = StateLinear(*sizes, units)
        self.norm = NormSiLU(units)
        self.hidden = init_weights(nn.Sequential(*(Dense(units, units) for _ in range(layers - 1))))
        self.output = init_weights(nn.Linear(units, outputs), outscale)

    def forward(self, state: State) -> Tensor:
        return self.output(self.hidden(self.norm(self.input(*state))))

    def unrolled(self, steps: int, rows: int) -> Callable[[State], Tensor]:
        """This function for one call with `rows` states at each of the steps of a recurrence, see `Unrolled`."""

        def product(weight: Tensor, bias: Tensor | None = None) -> Unrolled:
            known = weight.new_zeros(weight.shape[1]) if bias is None else bias
            return Unrolled(weight, known.expand(steps, rows, -1))

        read_z, read_h = product(self.input.stoch), product(self.input.rest.t())
        hidden = [(product(linear.weight.t()), norm) for linear, norm in self.hidden]
        output = product(self.output.weight.t(), self.output.bias)

        def run(state: State) -> Tensor:
            x = self.norm(read_z(state.index) + read_h(state.deter))
            for linear, norm in hidden:
                x = norm(linear(x))
            return output(x)

        return run


def centered(obs: Tensor) -> Tensor:
    """uint8 pixels as float32 from -0.5 to 0.5."""
    return obs.float().mul_(1 / 255).sub_(0.5)


class ChannelNorm(NormSiLU):
    """Over the channels of each pixel, for (N, C, H, W) in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Centered pixels (..., 64, 64, 3) to the embedding (..., E), E = 4 * 4 * 8 * depth."""

    def __init__(self, depth: int):
        super().__init__()
        channels = [3] + [depth << stage for stage in range(_STAGES)]
        layers = []
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False), ChannelNorm(outputs)]
        self.layers = init_weights(nn.Sequential(*layers)).to(memory_format=torch.channels_last)
        self.outputs = channels[-1] * _CORNER**2

    def forward(self, obs: Tensor) -> Tensor:
        x = self.layers(obs.flatten(0, -4).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x.reshape(*obs.shape[:-3], self.outputs)


def tiles(image: Tensor) -> Tensor:
    """(..., 64, 64, 3) as the decoder puts it: (..., 32, 32, 2, 6), two by two pixels side by side. A view."""
    return image.unflatten(-3, (IMAGE // 2, 2)).unflatten(-2, (IMAGE // 2, 2)).flatten(-2).transpose(-3, -2)


def untiled(tiles: Tensor) -> Tensor:
    """The inverse of `tiles`."""
    return tiles.transpose(-3, -2).reshape(*tiles.shape[:-4], IMAGE, IMAGE, 3)


class ToPixels(nn.ConvTranspose2d):
    """A transposed 4 x 4 convolution of stride 2 to three channels, (N, C, 32, 32) to `tiles` (N, 32, 32, 2, 6).

    Each tile of two by two pixels depends on three by three positions, so it is an ordinary 3 x 3 convolution to 12
    channels: over two times the multiplications, in a third of the time, since three channels alone fill no vector.
    """

    # k of the transposed kernel at offsets -1, 0, 1 from a tile, for its first and second pixel; 4 stands for none.
    _TAPS = ((3, 1, 4), (4, 2, 0))

    def __init__(self, inputs: int):
        super().__init__(inputs, 3, 4, stride=2, padding=1)
        self.register_buffer("taps", torch.tensor(self._TAPS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.pad(self.weight, (0, 1, 0, 1))[:, :, self.taps][..., self.taps]  # (C, 3, row, 3, column, 3)
        kernel = kernel.permute(2, 4, 1, 0, 3, 5).reshape(12, -1, 3, 3)
        x = F.conv2d(x, kernel.contiguous(memory_format=torch.channels_last), self.bias.repeat(4), padding=1)
        return x.permute(0, 2, 3, 1).unflatten(-1, (2, 6))


class Decoder(nn.Module):
    """A state to the mean of the image less a half, -0.5 to 0.5, as `tiles` (..., 32, 32, 2, 6)."""

    kernels: Kernels | None = None  # for the loss of what it draws, see NormSiLU

    def __init__(self, sizes: Sizes, depth: int):
        super().__init__()
        channels = [depth << stage for stage in reversed(range(_STAGES))] + [3]
        self.corner = (channels[0], _CORNER, _CORNER)
        self.linear = StateLinear(*sizes, math.prod(self.corner), bias=True)
        layers = []
        for inputs, outputs in itertools.pairwise(channels[:-1]):
            layers.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False))
            layers.append(ChannelNorm(outputs))
        layers.append(ToPixels(channels[-2]))
        self.layers = init_weights(nn.Sequential(*layers)).to(memory_format=torch.channels_last)

    def forward(self, state: State) -> Tensor:
        channels, height, width = self.corner
        x = self.linear(*state).view(-1, height, width, channels).permute(0, 3, 1, 2)
        return self.layers(x).unflatten(0, state.deter.shape[:-1])
