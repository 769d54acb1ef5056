"""One network's gradient steps: Adam, and Muon for matrices that are named to it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dreamer.config import OptimizerConfig

# Of the iteration that makes an update's singular values equal. Five, the usual number, learn no faster than three, and
# cost more.
_NEWTON_SCHULZ_STEPS = 3


class Optimizer:
    """Adam on a network whose gradient is clipped by global norm (section 5.8).

    Args:
        matrices: weights of the network that Muon takes, each with the rows that one of its matrices has
        muon_lr: Muon's learning rate, in units of Adam's; 0: all weights are Adam's

    Muon's source: Jordan et al. 2024, with the scale of Liu et al. 2025 (arXiv 2502.16982).
    """

    def __init__(
        self,
        network: nn.Module,
        config: OptimizerConfig,
        matrices: Iterable[tuple[Tensor, int]] = (),
        muon_lr: float = 0,
    ):
        self.parameters = list(network.parameters())
        self.grad_clip = config.grad_clip
        self._matrices = list(matrices) if muon_lr else []
        taken = {id(weight) for weight, _ in self._matrices}
        rest = [parameter for parameter in self.parameters if id(parameter) not in taken]
        on_gpu = self.parameters[0].is_cuda
        self.adam = torch.optim.Adam(rest, lr=config.lr, eps=config.eps, fused=True, capturable=on_gpu)
        self.muon: torch.optim.Muon | None = None
        if self._matrices:
            self._views = [
                view.requires_grad_() for weight, rows in self._matrices for view in _as_matrices(weight.detach(), rows)
            ]
            self.muon = torch.optim.Muon(
                self._views,
                lr=muon_lr,
                weight_decay=0.0,
                ns_steps=_NEWTON_SCHULZ_STEPS,
                adjust_lr_fn="match_rms_adamw",
            )

    def step(self, gradients: list[Tensor]) -> Tensor:
        """Returns the gradient's norm before clipping."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient.stride() != parameter.stride():  # fused Adam walks through both as they lie in memory
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.adam.step()
        if self.muon:
            found = (view for weight, rows in self._matrices for view in _as_matrices(weight.grad, rows))
            for view, gradient in zip(self._views, found, strict=True):
                view.grad = gradient
            self.muon.step()
            self.muon.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "muon": self.muon and self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        if self.muon:
            self.muon.load_state_dict(state["muon"])


def _as_matrices(weight: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Views of a weight, `rows` of its first dimension each. A kernel's row is all that one channel has."""
    flat = weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight
    return flat.split(rows)
