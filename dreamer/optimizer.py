"""One network's gradient steps."""

from typing import Any

import torch
from torch import Tensor, nn

from dreamer.config import OptimizerConfig


class Optimizer:
    """Adam on one network, with its gradient clipped by global norm (section 5.8)."""

    def __init__(self, network: nn.Module, config: OptimizerConfig):
        self.parameters = list(network.parameters())
        self.config = config
        device = self.parameters[0].device
        self._lr = torch.tensor(config.lr, device=device)  # a tensor, so that a CUDA graph reads what it is now
        on_gpu = device.type == "cuda"
        self.adam = torch.optim.Adam(self.parameters, self._lr, eps=config.eps, fused=True, capturable=on_gpu)

    def scale_lr(self, scale: float) -> None:
        """From the next step on the learning rate is `scale` of the configuration's."""
        self._lr.fill_(scale * self.config.lr)

    def step(self, gradients: list[Tensor]) -> Tensor:
        """Returns the gradient's norm before clipping."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient.stride() != parameter.stride():  # fused Adam walks through both as they lie in memory
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All but the learning rate, which is the configuration's and time's."""
        self.adam.load_state_dict(state)
        for group in self.adam.param_groups:
            group["lr"] = self._lr
