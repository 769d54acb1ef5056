"""Encoder, decoder and heads (sections 2.1 and 2.3 to 2.7). Images are channels last throughout."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer.unrolled import compute_dtype, one_hot_product

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


class Dense(nn.Sequential):
    """Linear without bias, LayerNorm, SiLU: (..., inputs) to (..., units)."""

    def __init__(self, inputs: int, units: int):
        super().__init__(nn.Linear(inputs, units, bias=False), nn.LayerNorm(units, NORM_EPS), nn.SiLU())


class MLP(nn.Module):
    """A state through `layers` of Linear, LayerNorm, SiLU and a linear output, (..., outputs).

    Args:
        outscale: of the output layer's initial weights; 0 makes the first predictions exactly uniform
    """

    def __init__(self, sizes: Sizes, units: int, layers: int, outputs: int, outscale: float):
        super().__init__()
        self.input = StateLinear(*sizes, units)
        self.norm = nn.LayerNorm(units, NORM_EPS)
        self.hidden = init_weights(nn.Sequential(*(Dense(units, units) for _ in range(layers - 1))))
        self.output = init_weights(nn.Linear(units, outputs), outscale)

    def forward(self, state: State) -> Tensor:
        return self.output(self.hidden(F.silu(self.norm(self.input(*state)))))


def centered(obs: Tensor) -> Tensor:
    """uint8 pixels as float32 from -0.5 to 0.5."""
    return obs.float().mul_(1 / 255).sub_(0.5)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, then SiLU, for (N, C, H, W) in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Centered pixels (..., 64, 64, 3) to the embedding (..., E), E = 4 * 4 * 8 * depth."""

    def __init__(self, depth: int):
        super().__init__()
        channels = [3] + [depth << stage for stage in range(_STAGES)]
        layers = []
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False), ChannelNorm(outputs, NORM_EPS)]
        self.layers = init_weights(nn.Sequential(*layers)).to(memory_format=torch.channels_last)
        self.outputs = channels[-1] * _CORNER**2

    def forward(self, obs: Tensor) -> Tensor:
        x = self.layers(obs.flatten(0, -4).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x.reshape(*obs.shape[:-3], self.outputs)


class Decoder(nn.Module):
    """A state to the mean of the image less a half, (..., 64, 64, 3), -0.5 to 0.5."""

    def __init__(self, sizes: Sizes, depth: int):
        super().__init__()
        channels = [depth << stage for stage in reversed(range(_STAGES))] + [3]
        self.corner = (channels[0], _CORNER, _CORNER)
        self.linear = StateLinear(*sizes, math.prod(self.corner), bias=True)
        layers = []
        for inputs, outputs in itertools.pairwise(channels):
            last = outputs == 3
            layers.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=last))
            layers += [] if last else [ChannelNorm(outputs, NORM_EPS)]
        self.layers = init_weights(nn.Sequential(*layers)).to(memory_format=torch.channels_last)

    def forward(self, state: State) -> Tensor:
        channels, height, width = self.corner
        x = self.linear(*state).view(-1, height, width, channels).permute(0, 3, 1, 2)
        return self.layers(x).permute(0, 2, 3, 1).reshape(*state.deter.shape[:-1], IMAGE, IMAGE, 3)
