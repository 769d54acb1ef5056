"""A function of tensors as one CUDA graph: thousands of kernels are launched by one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

WARMUP = 3  # calls before the capture, in which libraries choose their algorithms and gradients get their memory


class Captured:
    """Calls `function` as it is a few times, then records it once and replays the record.

    The function must not wait for the device nor depend on anything but its tensors, the weights it updates in place
    and torch's random state. Inputs of another shape than the recorded ones are an error.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function, self._calls = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function returns; the caller may keep it."""
        if self._calls < WARMUP:
            self._calls += 1
            return self._beside(inputs)
        if self._graph is None:
            self._inputs = [value.clone() for value in inputs]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._outputs = self._function(*self._inputs)
            self._graph = graph
        for kept, value in zip(self._inputs, inputs, strict=True):
            if kept.shape != value.shape:
                raise ValueError(f"recorded for {tuple(kept.shape)}, called with {tuple(value.shape)}")
            kept.copy_(value, non_blocking=True)
        self._graph.replay()
        return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self._outputs)

    def _beside(self, inputs: tuple[Tensor, ...]) -> Any:
        """On a stream of its own, as the documentation of CUDA graphs asks of calls before a capture."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self._function(*inputs)
        current.wait_stream(stream)
        return outputs
