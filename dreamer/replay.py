"""Experience in memory and on disk: write-once chunks of consecutive steps, one stream an environment."""

import hashlib
import io
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import ReplayConfig
from dreamer.rollout import NO_ACTION, Steps

_NAME = re.compile(r"(?P<stream>.+)-(?P<start>\d{9})-(?P<length>\d{5})-(?P<digest>[0-9a-f]{16})\.npz")


class ChunkError(ValueError):
    """A chunk's content is not what was written. The message names the file and the remedy."""


@dataclass
class Batch:
    """B sequences of T consecutive steps, aligned as in `dreamer.rollout`. They may cross episodes, at an `is_first`."""

    obs: np.ndarray  # (B, T, 64, 64, 3) uint8
    action: np.ndarray  # (B, T) int64, NO_ACTION where is_first
    reward: np.ndarray  # (B, T) float32
    is_first: np.ndarray  # (B, T) bool
    is_last: np.ndarray  # (B, T) bool
    is_terminal: np.ndarray  # (B, T) bool


@dataclass
class Chunk:
    """Up to `chunk_length` consecutive steps of one stream, the first of them number `start` of the stream."""

    stream: str
    start: int
    length: int
    obs: np.ndarray  # (chunk_length, 64, 64, 3) uint8
    action: np.ndarray  # (chunk_length,) int8
    reward: np.ndarray  # (chunk_length,) float32
    flags: np.ndarray  # (chunk_length,) uint8: 1 is_first, 2 is_last, 4 is_terminal
    file: str | None = None  # its name once written

    @classmethod
    def empty(cls, stream: str, start: int, capacity: int, obs_shape: tuple[int, ...]) -> "Chunk":
        small = [np.zeros(capacity, dtype) for dtype in (np.int8, np.float32, np.uint8)]
        return cls(stream, start, 0, np.zeros((capacity, *obs_shape), np.uint8), *small)

    def arrays(self) -> dict[str, np.ndarray]:
        """The filled part by name."""
        return {name: getattr(self, name)[: self.length] for name in ("obs", "action", "reward", "flags")}

    def save(self, directory: Path) -> None:
        """Writes `STREAM-START-LENGTH-DIGEST.npz` once: temporary name, flush, rename."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.arrays())
        content = buffer.getvalue()
        digest = hashlib.sha256(content).hexdigest()[:16]
        name = f"{self.stream}-{self.start:09d}-{self.length:05d}-{digest}.npz"
        temporary = directory / f"{name}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(directory / name)
        self.file = name

    @classmethod
    def load(cls, path: Path) -> "Chunk":
        """Reads and verifies one file.

        Raises:
            ChunkError: the name is not a chunk's, or the content does not match the digest in it
        """
        if not (parts := _NAME.fullmatch(path.name)):
            raise ChunkError(f"{path}: not a replay chunk (STREAM-START-LENGTH-DIGEST.npz); move it out of {path.parent}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != parts["digest"]:
            raise ChunkError(f"{path}: truncated or edited; restore it with: dvc checkout --force {path.parent}")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return cls(parts["stream"], int(parts["start"]), int(parts["length"]), **arrays, file=path.name)


class Replay:
    """Holds up to `capacity` steps and samples sequences uniformly over their starts.

    A stream is the endless sequence of steps of one environment. Sealed (full) chunks are immutable; only a stream's last
    one grows. When there are more than `capacity` steps, the oldest chunk goes.
    """

    def __init__(self, config: ReplayConfig):
        self.config = config
        self._chunks: list[Chunk] = []  # in the order in which they were begun
        self._open: dict[str, Chunk] = {}
        self._lengths: dict[int, tuple] = {}
        self._runs: list[list[Chunk]] = []

    def __len__(self) -> int:
        return sum(chunk.length for chunk in self._chunks)

    def add(self, streams: Iterable[str], steps: Steps) -> None:
        """Appends one step to each stream."""
        for i, stream in enumerate(streams):
            chunk = self._open.get(stream)
            if chunk is None or chunk.length == self.config.chunk_length:
                chunk = self._begin(stream, 0 if chunk is None else chunk.start + chunk.length, steps.obs.shape[1:])
            t = chunk.length
            chunk.obs[t], chunk.action[t], chunk.reward[t] = steps.obs[i], steps.action[i], steps.reward[i]
            chunk.flags[t] = steps.is_first[i] + 2 * steps.is_last[i] + 4 * steps.is_terminal[i]
            chunk.length += 1

    def _begin(self, stream: str, start: int, obs_shape: tuple[int, ...]) -> Chunk:
        chunk = Chunk.empty(stream, start, self.config.chunk_length, obs_shape)
        self._open[stream] = chunk
        self._append(chunk)
        while len(self._chunks) > 1 and len(self) - self._chunks[0].length >= self.config.capacity:
            self._chunks.pop(0)
            self._index()
        return chunk

    def _append(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._index()

    def _index(self) -> None:
        """Groups the chunks into runs that follow each other without a gap."""
        by_stream: dict[str, list[Chunk]] = {}
        for chunk in self._chunks:
            by_stream.setdefault(chunk.stream, []).append(chunk)
        self._runs = []
        for chunks in by_stream.values():
            chunks.sort(key=lambda chunk: chunk.start)
            for chunk in chunks:
                last = self._runs[-1][-1] if self._runs else None
                if last and last.stream == chunk.stream and last.start + self._full(last) == chunk.start:
                    self._runs[-1].append(chunk)
                else:
                    self._runs.append([chunk])

    def _full(self, chunk: Chunk) -> int:
        return len(chunk.obs)

    def starts(self, length: int) -> int:
        """How many sequences of `length` steps there are."""
        return sum(max(0, sum(chunk.length for chunk in run) - length + 1) for run in self._runs)

    def sample(self, batch_size: int, batch_length: int, rng: np.random.Generator) -> Batch:
        """`batch_size` sequences, each start equally likely, with replacement.

        Raises:
            ValueError: no stream is `batch_length` long yet
        """
        counts = [max(0, sum(chunk.length for chunk in run) - batch_length + 1) for run in self._runs]
        ends = np.cumsum(counts)
        if not len(ends) or not ends[-1]:
            raise ValueError(f"no stream of the replay has {batch_length} steps yet: it holds {len(self)} in all")
        obs_shape = self._chunks[0].obs.shape[1:]
        obs = np.empty((batch_size, batch_length, *obs_shape), np.uint8)
        action = np.empty((batch_size, batch_length), np.int64)
        reward = np.empty((batch_size, batch_length), np.float32)
        flags = np.empty((batch_size, batch_length), np.uint8)
        for b, draw in enumerate(rng.integers(ends[-1], size=batch_size)):
            run = int(np.searchsorted(ends, draw, side="right"))
            offset, filled = int(draw - (ends[run] - counts[run])), 0
            for chunk in self._runs[run]:
                if offset >= chunk.length:
                    offset -= chunk.length
                    continue
                take = min(chunk.length - offset, batch_length - filled)
                source, target = slice(offset, offset + take), slice(filled, filled + take)
                obs[b, target], action[b, target] = chunk.obs[source], chunk.action[source]
                reward[b, target], flags[b, target] = chunk.reward[source], chunk.flags[source]
                filled, offset = filled + take, 0
                if filled == batch_length:
                    break
        return Batch(obs, action, reward, *((flags & bit).astype(bool) for bit in (1, 2, 4)))

    def save(self, directory: Path, partial: bool = False) -> None:
        """Writes the chunks that are full and not yet written; with `partial`, also those that still grow.

        Files of chunks that are no longer held are removed.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for chunk in self._chunks:
            if chunk.file is None and chunk.length and (partial or chunk.length == self._full(chunk)):
                chunk.save(directory)
        held = {chunk.file for chunk in self._chunks}
        for path in directory.iterdir():
            if path.name not in held:
                path.unlink()

    def load(self, directory: Path, names: Iterable[str] | None = None) -> None:
        """Adds the chunks of a directory: all, or those named. Verifies each.

        Raises:
            ChunkError: a file is damaged or missing
        """
        paths = sorted(directory.iterdir()) if names is None else [directory / name for name in names]
        for path in paths:
            if not path.is_file():
                raise ChunkError(f"{path}: missing; restore it with: dvc checkout --force {directory}")
            self._append(Chunk.load(path))

    def state_dict(self) -> dict[str, Any]:
        """The growing chunks' content and the written ones' names; `save` must have been called."""
        return {
            "files": [chunk.file for chunk in self._chunks if chunk.file],
            "open": [
                {"stream": chunk.stream, "start": chunk.start, "length": chunk.length, **chunk.arrays()}
                for chunk in self._chunks
                if not chunk.file
            ],
        }
