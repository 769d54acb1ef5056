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
from dreamer.rollout import Steps

_NAME = re.compile(r"(?P<stream>.+)-(?P<start>\d{9})-(?P<length>\d{5})-(?P<digest>[0-9a-f]{16})\.npz")


class ChunkError(ValueError):
    """A chunk's content is not what was written. The message names the file and the remedy."""


@dataclass
class Batch:
    """B sequences of T consecutive steps, aligned as in `dreamer.rollout`; at an `is_first` an episode begins."""

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

    @property
    def full(self) -> bool:
        return self.length == len(self.obs)

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
            raise ChunkError(
                f"{path}: not a replay chunk (STREAM-START-LENGTH-DIGEST.npz); move it out of {path.parent}"
            )
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != parts["digest"]:
            raise ChunkError(f"{path}: truncated or edited; restore it with: dvc checkout --force {path.parent}")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return cls(parts["stream"], int(parts["start"]), int(parts["length"]), **arrays, file=path.name)


def digest(directory: Path) -> str:
    """Of all chunks in a directory: SHA-256 of their names, each of which carries its content's."""
    return hashlib.sha256("\n".join(sorted(path.name for path in directory.glob("*.npz"))).encode()).hexdigest()


class Replay:
    """Holds about `capacity` steps and samples sequences uniformly over their starts.

    A stream is the endless sequence of steps of one environment. Full chunks never change again; only a stream's last
    one grows. When a new chunk begins and the rest suffices for `capacity`, the oldest goes.
    """

    def __init__(self, config: ReplayConfig):
        self.config = config
        self._chunks: list[Chunk] = []  # in the order in which they were begun
        self._last: dict[str, Chunk] = {}  # of each stream
        self._runs: list[list[Chunk]] = []  # chunks that follow each other without a gap

    def __len__(self) -> int:
        return sum(chunk.length for chunk in self._chunks)

    @property
    def decisions(self) -> int:
        """How many of the steps came of a decision: all but the first of each episode."""
        return sum(int(np.count_nonzero(~chunk.arrays()["flags"] & 1)) for chunk in self._chunks)

    def add(self, streams: Iterable[str], steps: Steps) -> None:
        """Appends one step to each stream."""
        for i, stream in enumerate(streams):
            chunk = self._last.get(stream)
            if chunk is None or chunk.full:
                start = 0 if chunk is None else chunk.start + chunk.length
                chunk = Chunk.empty(stream, start, self.config.chunk_length, steps.obs.shape[1:])
                self._append(chunk)
                while len(self) - self._chunks[0].length >= self.config.capacity:
                    self._chunks.pop(0)
                self._index()
            t = chunk.length
            chunk.obs[t], chunk.action[t], chunk.reward[t] = steps.obs[i], steps.action[i], steps.reward[i]
            chunk.flags[t] = steps.is_first[i] + 2 * steps.is_last[i] + 4 * steps.is_terminal[i]
            chunk.length += 1

    def _append(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._last[chunk.stream] = chunk

    def _index(self) -> None:
        self._runs = []
        for chunk in sorted(self._chunks, key=lambda chunk: (chunk.stream, chunk.start)):
            last = self._runs[-1][-1] if self._runs else None
            if last and last.stream == chunk.stream and last.start + last.length == chunk.start:
                self._runs[-1].append(chunk)
            else:
                self._runs.append([chunk])

    def _counts(self, length: int) -> list[int]:
        return [max(0, sum(chunk.length for chunk in run) - length + 1) for run in self._runs]

    def starts(self, length: int) -> int:
        """How many sequences of `length` steps there are."""
        return sum(self._counts(length))

    def sample(self, batch_size: int, batch_length: int, rng: np.random.Generator) -> Batch:
        """`batch_size` sequences, each start equally likely, with replacement.

        Raises:
            ValueError: no stream is `batch_length` long yet
        """
        counts = self._counts(batch_length)
        ends = np.cumsum(counts)
        if not sum(counts):
            raise ValueError(f"no stream of the replay has {batch_length} steps yet: it holds {len(self)} in all")
        shape = (batch_size, batch_length)
        obs = np.empty((*shape, *self._chunks[0].obs.shape[1:]), np.uint8)
        action, reward, flags = np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.uint8)
        for b, draw in enumerate(rng.integers(ends[-1], size=batch_size)):
            run = int(np.searchsorted(ends, draw, side="right"))
            offset, filled = int(draw - (ends[run] - counts[run])), 0
            for chunk in self._runs[run]:
                take = min(chunk.length - offset, batch_length - filled)
                if take <= 0:
                    offset -= chunk.length
                    continue
                source, target = slice(offset, offset + take), slice(filled, filled + take)
                obs[b, target], action[b, target] = chunk.obs[source], chunk.action[source]
                reward[b, target], flags[b, target] = chunk.reward[source], chunk.flags[source]
                filled, offset = filled + take, 0
                if filled == batch_length:
                    break
        return Batch(obs, action, reward, *((flags & bit).astype(bool) for bit in (1, 2, 4)))

    def save(self, directory: Path, partial: bool = False) -> None:
        """Writes the chunks that are full and not yet written; with `partial`, also those that still grow."""
        directory.mkdir(parents=True, exist_ok=True)
        for chunk in self._chunks:
            if chunk.file is None and chunk.length and (partial or chunk.full):
                chunk.save(directory)

    def prune(self, directory: Path) -> None:
        """Removes the chunk files of `directory` that are not held (any more)."""
        held = {chunk.file for chunk in self._chunks}
        for path in directory.glob("*.npz*"):
            if path.name not in held:
                path.unlink()

    def load(self, directory: Path) -> None:
        """Adds all chunks of a directory, verified.

        Raises:
            ChunkError: a file is damaged or no chunk, or there is none
        """
        paths = sorted(path for path in directory.glob("*") if path.name != ".gitignore")
        if not paths:
            raise ChunkError(f"{directory}: holds no replay chunks; make them (dvc repro) or fetch them (dvc pull)")
        for path in paths:
            self._append(Chunk.load(path))
        self._index()

    def state_dict(self) -> dict[str, Any]:
        """The written chunks' names and the others' content."""
        return {
            "files": [chunk.file for chunk in self._chunks if chunk.file],
            "growing": [
                {"stream": chunk.stream, "start": chunk.start, **chunk.arrays()}
                for chunk in self._chunks
                if not chunk.file
            ],
        }

    def load_state_dict(self, state: dict[str, Any], *directories: Path) -> None:
        """Replaces the content; written chunks are looked for in `directories`.

        Raises:
            ChunkError: one of them is missing or damaged
        """
        self._chunks, self._last = [], {}
        for name in state["files"]:
            path = next((path for directory in directories if (path := directory / name).is_file()), None)
            if path is None:
                raise ChunkError(
                    f"{directories[-1] / name}: missing, and the checkpoint needs it; remove that to start afresh"
                )
            self._append(Chunk.load(path))
        for saved in state["growing"]:
            arrays = {name: np.asarray(saved[name]) for name in ("obs", "action", "reward", "flags")}
            chunk = Chunk.empty(saved["stream"], saved["start"], self.config.chunk_length, arrays["obs"].shape[1:])
            chunk.length = len(arrays["obs"])
            for name, filled in chunk.arrays().items():
                filled[:] = arrays[name]
            self._append(chunk)
        self._index()
