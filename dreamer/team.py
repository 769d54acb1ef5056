"""Processes that find an update's gradients side by side on a CPU, each for its rows of the batch."""

import itertools
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dreamer.learning import Gradients, Learning, Metrics, Rows

_LARGEST = 4  # processes; beyond it they get several threads each
_ALIGN = 16  # values, a cache line
_SHARED = Path("/dev/shm")  # where Linux keeps shared memory


class WorkerError(RuntimeError):
    """A process of a team has ended, or there is no room for a team."""


class Team:
    """`Learning` by several processes: this one and workers that it starts.

    Threads would do if Python ran in more than one at a time. As it is they hand its lock to and fro thousands of times
    an update, and two of them are no faster than one on a small batch. Torch's own threads meet after every product,
    which is slower still. Processes meet three times, and share nothing but the weights, which lie in shared memory,
    and the gradients.

    Args:
        learning: of this process; its weights move into shared memory
        size: processes in all, but no more than torch may use threads, which they share evenly
        initializer: a function of a module, that each worker calls first

    Raises:
        WorkerError: shared memory is too small
    """

    def __init__(self, learning: Learning, size: int, initializer: Callable[[], None] | None = None):
        self._threads = torch.get_num_threads()
        size = min(size, self._threads, _LARGEST)
        self._own, self._workers = learning, []
        if size > 1:
            _check_room(learning, size - 1)
            _share(learning)
            threads = self._threads // size
            self._workers = [_Worker(learning, threads, initializer) for _ in range(size - 1)]
            torch.set_num_threads(threads)

    def learn(self, rows: Rows) -> tuple[Gradients, Metrics, tuple[Tensor, Tensor]]:
        """As `Learning.learn`, of all rows."""
        batch, size = len(rows.obs), len(self._workers) + 1
        bounds = [batch * i // size for i in range(size + 1)]
        parts = [slice(*pair) for pair in itertools.pairwise(bounds) if pair[0] < pair[1]]
        shares = [(part.stop - part.start) / batch for part in parts]
        # The last part is this process's, so that a batch of fewer rows than processes leaves out workers.
        self._busy = self._workers[: len(parts) - 1]
        for worker, part, share in zip(self._busy, parts, shares, strict=False):
            worker.ask("learn", rows.part(part), share)
        gradients, metrics, own = self._own.learn(rows.part(parts[-1]), shares[-1])
        found = []
        for worker in self._busy:
            ((index, deter),) = worker.add_to(gradients, metrics)
            found.append((index, deter.to(own[1].dtype)))
        return gradients, metrics, tuple(map(torch.cat, zip(*found, own, strict=True)))

    def dream(self) -> tuple[Tensor, Tensor]:
        """As `Learning.dream`; of all, in the order of the rows."""
        for worker in self._busy:
            worker.ask("dream")
        own = self._own.dream()
        found = [worker.answer() for worker in self._busy]
        return tuple(torch.cat(parts, 1) for parts in zip(*found, own, strict=True))

    def behave(self, unit: tuple[Tensor, Tensor]) -> tuple[Gradients, Metrics]:
        """As `Learning.behave`, of all."""
        for worker in self._busy:
            worker.ask("behave", unit)
        gradients, metrics = self._own.behave(unit)
        for worker in self._busy:
            worker.add_to(gradients, metrics)
        return gradients, metrics

    def everywhere(self, function: Callable[[], Any]) -> list[Any]:
        """What a function of a module, called in each process, returns."""
        for worker in self._workers:
            worker.ask("call", function)
        return [function(), *(worker.answer() for worker in self._workers)]

    def close(self) -> None:
        """Ends the workers; from then on this process learns alone."""
        for worker in self._workers:
            worker.close()
        self._workers = []
        torch.set_num_threads(self._threads)


class _Worker:
    """The other end of `_serve`."""

    def __init__(self, learning: Learning, threads: int, initializer: Callable[[], None] | None):
        self.gradients = {name: _places(network) for name, network in learning.networks.items()}
        context = torch.multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, learning, self.gradients, threads, initializer)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> None:
        try:
            self._connection.send((method, _arrays(arguments)))
        except BrokenPipeError:
            self._ended()

    def answer(self) -> Any:
        """
        Raises:
            WorkerError: the process is gone, or its method failed
        """
        try:
            answer, failure = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._ended()
        if failure:
            raise RuntimeError(f"in a worker process:\n{failure}")
        return _tensors(answer)

    def add_to(self, gradients: Gradients, metrics: Metrics) -> list[Any]:
        """Adds the answer's share of both, in place. Returns what else is in the answer."""
        measured, *rest = self.answer()
        for name, total in gradients.items():
            torch._foreach_add_(total, self.gradients[name])
        for name, value in measured.items():
            metrics[name] = metrics[name] + value
        return rest

    def _ended(self) -> None:
        self._process.join()
        code = self._process.exitcode
        why = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise WorkerError(
            f"a process that shares the updates {why}; where memory is short, let one do them all (OMP_NUM_THREADS=1)"
        ) from None

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(
    connection: Connection,
    learning: Learning,
    gradients: Gradients,
    threads: int,
    initializer: Callable[[], None] | None,
) -> None:
    """A worker's life: answers until the other end is closed. Ctrl-C is the other end's to act on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if initializer:
        initializer()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer, failure = _answer(learning, gradients, method, _tensors(arguments)), None
        except Exception:
            answer, failure = None, traceback.format_exc()
        try:
            connection.send((_arrays(answer), failure))
        except BrokenPipeError:
            os._exit(1)


def _answer(learning: Learning, shared: Gradients, method: str, arguments: Sequence[Any]) -> Any:
    if method == "call":
        return arguments[0]()
    found = getattr(learning, method)(*arguments)
    if method == "dream":
        return found
    gradients, *rest = found
    for name, own in gradients.items():
        torch._foreach_copy_(shared[name], own)
    return rest


def _shared_networks(learning: Learning) -> list[nn.Module]:
    return list({id(each): each for each in (learning.model, learning.learner, learning.actor_critic)}.values())


def _check_room(learning: Learning, workers: int) -> None:
    """Because what is too much for /dev/shm, of which containers have little, ends a process without a word."""
    if not _SHARED.is_dir():
        return
    networks = _shared_networks(learning) + workers * list(learning.networks.values())
    needed = sum(_size(parameter) for network in networks for parameter in network.parameters()) * 4
    if needed > (free := shutil.disk_usage(_SHARED).free):
        raise WorkerError(
            f"{_SHARED}: {free / 1e6:.0f} MB are free, a team of processes needs {needed / 1e6:.0f}; make it larger "
            "(in a container, runner.shared_memory or --shm-size), or let one do the updates (OMP_NUM_THREADS=1)"
        )


def _share(learning: Learning) -> None:
    """Moves all weights into shared memory, in place; each network is one mapping, of which its weights are views."""
    for network in _shared_networks(learning):
        with torch.no_grad():
            for parameter, place in zip(network.parameters(), _places(network), strict=True):
                parameter.data = place.copy_(parameter)
        for buffer in network.buffers():
            buffer.share_memory_()


def _places(network: nn.Module) -> list[Tensor]:
    """Shared memory for a network's parameters: zeros for each, laid out as the parameter is."""
    parameters = list(network.parameters())
    sizes = [_size(parameter) for parameter in parameters]
    places = torch.zeros(sum(sizes)).share_memory_().split(sizes)
    return [
        place.as_strided(parameter.shape, parameter.stride(), place.storage_offset())
        for place, parameter in zip(places, parameters, strict=True)
    ]


def _size(parameter: Tensor) -> int:
    """Values, whole cache lines of them."""
    return -(-parameter.numel() // _ALIGN) * _ALIGN


def _arrays(tree: Any) -> Any:
    """Its tensors as arrays, which a pipe takes sooner; bfloat16, which numpy does not know, as float32."""

    def array(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).detach().numpy()

    return tree_map(array, tree)


def _tensors(tree: Any) -> Any:
    return tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)
