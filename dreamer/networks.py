"""Encoder, decoder and heads (sections 2.1 and 2.3 to 2.7). Images are channels last throughout."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-3
IMAGE = 64
_STAGES = 4  # convolutions, each halving the image: 64 to 4
_CORNER = IMAGE >> _STAGES


def init_weights(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Truncated normal of variance scale / fan_avg, cut at two standard deviations; biases zero. In place.

    Source: the official DreamerV3 code; 0.8796 restores the variance that the cut takes away.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fans = sum(layer.weight.shape[:2]) * math.prod(layer.weight.shape[2:])
            std = math.sqrt(scale * 2 / fans) / 0.87962566103423978
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std) if scale else nn.init.zeros_(
                layer.weight
            )
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


class Dense(nn.Sequential):
    """Linear without bias, LayerNorm, SiLU: (..., inputs) to (..., units)."""

    def __init__(self, inputs: int, units: int):
        super().__init__(nn.Linear(inputs, units, bias=False), nn.LayerNorm(units, NORM_EPS), nn.SiLU())


class MLP(nn.Sequential):
    """`layers` of `Dense` and a linear output: (..., inputs) to (..., outputs).

    Args:
        outscale: of the output layer's initial weights; 0 makes the first predictions exactly uniform
    """

    def __init__(self, inputs: int, units: int, layers: int, outputs: int, outscale: float):
        hidden = [Dense(inputs if layer == 0 else units, units) for layer in range(layers)]
        super().__init__(*hidden, nn.Linear(units, outputs))
        init_weights(self)
        init_weights(self[-1], outscale)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, then SiLU, for (N, C, H, W) in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """(..., 64, 64, 3) uint8 to the embedding (..., E), E = 4 * 4 * 8 * depth."""

    def __init__(self, depth: int):
        super().__init__()
        channels = [3] + [depth << stage for stage in range(_STAGES)]
        layers = []
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False), ChannelNorm(outputs, NORM_EPS)]
        self.layers = init_weights(nn.Sequential(*layers)).to(memory_format=torch.channels_last)
        self.outputs = channels[-1] * _CORNER**2

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.flatten(0, -4).permute(0, 3, 1, 2).to(self.layers[0].weight.dtype) / 255 - 0.5
        x = self.layers(x).permute(0, 2, 3, 1)
        return x.reshape(*obs.shape[:-3], self.outputs)


class Decoder(nn.Module):
    """Features (..., F) to the mean of the image, (..., 64, 64, 3), 0 to 1."""

    def __init__(self, inputs: int, depth: int):
        super().__init__()
        channels = [depth << stage for stage in reversed(range(_STAGES))] + [3]
        self.corner = (channels[0], _CORNER, _CORNER)
        self.linear = init_weights(nn.Linear(inputs, math.prod(self.corner)))
        layers = []
        for inputs, outputs in itertools.pairwise(channels):
            last = outputs == 3
            layers.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=last))
            layers += [] if last else [ChannelNorm(outputs, NORM_EPS)]
        self.layers = init_weights(nn.Sequential(*layers)).to(memory_format=torch.channels_last)

    def forward(self, feat: Tensor) -> Tensor:
        channels, height, width = self.corner
        x = self.linear(feat.flatten(0, -2)).view(-1, height, width, channels).permute(0, 3, 1, 2)
        x = self.layers(x).permute(0, 2, 3, 1) + 0.5
        return x.reshape(*feat.shape[:-1], IMAGE, IMAGE, 3)
