"""A batch worked on in parts, each by one thread of a CPU."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

MOST = 4  # parts: Python runs in one thread at a time, so more would wait for it; they get several threads each instead


class Parts:
    """Splits work by rows of the batch among threads that share nothing but the weights.

    Torch would split each product among the threads and let them meet after every one, thousands of times an update:
    slower, and many times slower when another process wants a core. Here they meet three times. On a GPU there is one
    part, and no thread.
    """

    def __init__(self, device: torch.device):
        self._threads = 1 if device.type == "cuda" else torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    def rows(self, batch: int) -> list[slice]:
        """Of each part, as even as can be."""
        parts = min(self._threads, MOST, batch)
        return [slice(batch * i // parts, batch * (i + 1) // parts) for i in range(parts)]

    def map(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """`function` of each part's arguments, side by side."""
        if len(arguments[0]) == 1:
            return [function(*(of_parts[0] for of_parts in arguments))]
        if self._pool is None:
            workers = len(arguments[0])
            share = max(1, self._threads // workers)
            self._pool = ThreadPoolExecutor(workers, "part", initializer=torch.set_num_threads, initargs=(share,))
        return list(self._pool.map(function, *arguments))


def summed(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Of lists of tensors, one list a part. Overwrites the first list's tensors."""
    total = list(parts[0])
    for part in parts[1:]:
        torch._foreach_add_(total, list(part))
    return total
