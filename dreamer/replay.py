"""Experience in memory and on disk: write-once chunks of consecutive steps, one stream an environment.

In memory a step can have a context: the model's state just before it, from which a sequence that begins there starts.
Contexts change with the model, so no chunk's file has them.
"""

import hashlib
import io
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import ReplayConfig
from dreamer.rollout import Steps

_NAME = re.compile(r"(?P<stream>.+)-(?P<start>\d{9})-(?P<length>\d{5})-(?P<digest>[0-9a-f]{16})\.npz")

# A context's h, which lies in [-1, 1], is held as int8 in steps of 1/127: off by at most 0.004, 0.0023 in the root mean
# square, for a quarter of the memory.
DETER_SCALE = 127


class ChunkError(ValueError):
    """A chunk's content is not what was written. The message names the file and the remedy."""


@dataclass
class Context:
    """The model's state just before a step. At an `is_first` it means nothing."""

    stoch: np.ndarray  # (..., S) uint8: each categorical's class
    deter: np.ndarray  # (..., D) float32; in a chunk int8, `DETER_SCALE` times as much
    known: np.ndarray  # (...) bool; where not, the others mean nothing

    @classmethod
    def unknown(cls, n: int, stoch: int, deter: int) -> "Context":
        """Of n steps, to be held in a chunk."""
        return cls(np.zeros((n, stoch), np.uint8), np.zeros((n, deter), np.int8), np.zeros(n, bool))


@dataclass
class Batch:
    """B sequences of T consecutive steps, aligned as in `dreamer.rollout`; at an `is_first` an episode begins."""

    obs: np.ndarray  # (B, T, 64, 64, 3) uint8
    action: np.ndarray  # (B, T) int64, NO_ACTION where is_first
    reward: np.ndarray  # (B, T) float32
    is_first: np.ndarray  # (B, T) bool
    is_last: np.ndarray  # (B, T) bool
    is_terminal: np.ndarray  # (B, T) bool
    context: Context | None = None  # (B,): before the first step of each sequence; None: the replay has none
    origins: Sequence[tuple[str, int]] = ()  # stream and number of the first step of each sequence

    def arrays(self) -> dict[str, np.ndarray]:
        """What there is of every step, by name."""
        return {name: getattr(self, name) for name in ("obs", "action", "reward", "is_first", "is_last", "is_terminal")}


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
    context: Context | None = None  # (chunk_length,); None: all unknown

    @classmethod
    def empty(cls, stream: str, start: int, capacity: int, obs_shape: tuple[int, ...]) -> "Chunk":
        small = [np.zeros(capacity, dtype) for dtype in (np.int8, np.float32, np.uint8)]
        return cls(stream, start, 0, np.zeros((capacity, *obs_shape), np.uint8), *small)

    @property
    def full(self) -> bool:
        return self.length == len(self.obs)

    def know(self, steps: slice, stoch: np.ndarray, deter: np.ndarray) -> None:
        """Keeps the states before some steps: classes (n, S) and `DETER_SCALE` times h (n, D), whole numbers."""
        if self.context is None:
            self.context = Context.unknown(len(self.obs), stoch.shape[-1], deter.shape[-1])
        self.context.stoch[steps], self.context.deter[steps], self.context.known[steps] = stoch, deter, True

    def arrays(self) -> dict[str, np.ndarray]:
        """The filled part by name, without contexts."""
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
    """Of the data in a directory: SHA-256 over the names of its chunks, each of which carries its content's, and over
    the content of what else there is."""
    names = sorted(path.name for path in directory.glob("*.npz"))
    others = [path.read_text() for path in sorted(directory.glob("*.json"))]
    return hashlib.sha256("\n".join(names + others).encode()).hexdigest()


def _draw(spans: Sequence[tuple[str, int, int]], n: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """n of the starts in `spans`, each equally likely."""
    ends = np.cumsum([count for _, _, count in spans])
    draws = rng.integers(ends[-1], size=n)
    chosen = np.searchsorted(ends, draws, side="right")
    return [
        (spans[i][0], spans[i][1] + spans[i][2] - int(ends[i] - draw))
        for i, draw in zip(chosen.tolist(), draws.tolist(), strict=True)
    ]


class Replay:
    """Holds about `capacity` steps and samples sequences uniformly over their starts, some of them among the recent.

    A stream is the endless sequence of steps of one environment. Full chunks never change again, but for contexts; only
    a stream's last one grows. When a new chunk begins and the rest suffices for `capacity`, the oldest goes.
    """

    def __init__(self, config: ReplayConfig):
        self.config = config
        self._chunks: list[Chunk] = []  # in the order in which they were begun
        self._last: dict[str, Chunk] = {}  # of each stream
        self._growing: tuple[str, ...] = ()  # the streams of the last `add`
        self._sorted: list[Chunk] = []  # by stream and start
        self._keys: list[tuple[str, int]] = []  # their streams and starts
        self._runs: list[tuple[Chunk, Chunk]] = []  # first and last of chunks that follow each other without a gap

    def __len__(self) -> int:
        return sum(chunk.length for chunk in self._chunks)

    @property
    def decisions(self) -> int:
        """How many of the steps came of a decision: all but the first of each episode."""
        return sum(int(np.count_nonzero(~chunk.arrays()["flags"] & 1)) for chunk in self._chunks)

    def add(self, streams: Iterable[str], steps: Steps, latents: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Appends one step to each of N streams.

        Args:
            latents: the states before these steps, classes (N, S) uint8 and h (N, D) float32, if they are known: of the
                policy that acted
        """
        self._growing = tuple(streams)
        if latents is not None:
            stoch, deter = latents[0], np.rint(latents[1] * DETER_SCALE).clip(-DETER_SCALE, DETER_SCALE)
        for i, stream in enumerate(self._growing):
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
            if latents is not None:
                chunk.know(slice(t, t + 1), stoch[i : i + 1], deter[i : i + 1])
            chunk.length += 1

    def refresh(self, origins: Sequence[tuple[str, int]], stoch: np.ndarray, deter: np.ndarray) -> None:
        """Makes the posterior states of sampled sequences the contexts of the steps after each, where these are held.

        Args:
            origins: of the batch; stoch: classes (B, T, S) uint8; deter: (B, T, D) int8, `DETER_SCALE` times h
        """
        for b, (stream, number) in enumerate(origins):
            for chunk, held, given in self._parts(stream, number + 1, stoch.shape[1]):
                chunk.know(held, stoch[b, given], deter[b, given])

    def _append(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._last[chunk.stream] = chunk

    def _index(self) -> None:
        self._sorted = sorted(self._chunks, key=lambda chunk: (chunk.stream, chunk.start))
        self._keys = [(chunk.stream, chunk.start) for chunk in self._sorted]
        self._runs = []
        for chunk in self._sorted:
            first, last = self._runs[-1] if self._runs else (None, None)
            if last and last.stream == chunk.stream and last.start + last.length == chunk.start:
                self._runs[-1] = (first, chunk)
            else:
                self._runs.append((chunk, chunk))

    def _parts(self, stream: str, number: int, length: int) -> Iterator[tuple[Chunk, slice, slice]]:
        """Where the steps `number` to `number + length - 1` of a stream are, those that are held: chunk, place in it,
        place in the sequence."""
        end = number + length
        low, high = bisect_right(self._keys, (stream, number)) - 1, bisect_left(self._keys, (stream, end))
        for chunk in self._sorted[max(0, low) : high]:
            begin, stop = max(number, chunk.start), min(end, chunk.start + chunk.length)
            if chunk.stream == stream and begin < stop:
                yield chunk, slice(begin - chunk.start, stop - chunk.start), slice(begin - number, stop - number)

    def _spans(self, length: int) -> list[tuple[str, int, int]]:
        """Where sequences of `length` steps can start: stream, number of the first start, how many."""
        spans = (
            (first.stream, first.start, last.start + last.length - first.start - length + 1)
            for first, last in self._runs
        )
        return [span for span in spans if span[2] > 0]

    def _recent_spans(self, length: int) -> list[tuple[str, int, int]]:
        """Of the streams that grow, the last starts: `recent_steps` in all."""
        latest = {stream: (start, count) for stream, start, count in self._spans(length) if stream in self._growing}
        kept = {stream: min(count, self.config.recent_steps // len(latest)) for stream, (_, count) in latest.items()}
        return [(stream, start + count - kept[stream], kept[stream]) for stream, (start, count) in latest.items()]

    def starts(self, length: int) -> int:
        """How many sequences of `length` steps there are."""
        return sum(count for _, _, count in self._spans(length))

    def sample(self, batch_size: int, batch_length: int, rng: np.random.Generator) -> Batch:
        """`batch_size` sequences, with replacement: the first `recent_share` of them each equally likely among those
        that start in the last `recent_steps` of the streams that grow, the others among all.

        Raises:
            ValueError: no stream is `batch_length` long yet
        """
        spans = self._spans(batch_length)
        if not spans:
            raise ValueError(f"no stream of the replay has {batch_length} steps yet: it holds {len(self)} in all")
        share = round(batch_size * self.config.recent_share)
        recent = self._recent_spans(batch_length) if share else []
        origins = _draw(recent, share, rng) if recent else []
        origins += _draw(spans, batch_size - len(origins), rng)
        shape = (batch_size, batch_length)
        obs = np.empty((*shape, *self._chunks[0].obs.shape[1:]), np.uint8)
        action, reward, flags = np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.uint8)
        for b, (stream, number) in enumerate(origins):
            for chunk, held, target in self._parts(stream, number, batch_length):
                obs[b, target], action[b, target] = chunk.obs[held], chunk.action[held]
                reward[b, target], flags[b, target] = chunk.reward[held], chunk.flags[held]
        booleans = ((flags & bit).astype(bool) for bit in (1, 2, 4))
        return Batch(obs, action, reward, *booleans, self._context(origins), origins)

    def _context(self, origins: Sequence[tuple[str, int]]) -> Context | None:
        """Of the first step of each sequence."""
        some = next((chunk.context for chunk in reversed(self._chunks) if chunk.context), None)
        if some is None:
            return None
        found = Context.unknown(len(origins), some.stoch.shape[1], some.deter.shape[1])
        for b, (stream, number) in enumerate(origins):
            ((chunk, held, _),) = self._parts(stream, number, 1)
            if chunk.context:
                for name in ("stoch", "deter", "known"):
                    getattr(found, name)[b] = getattr(chunk.context, name)[held][0]
        found.deter = found.deter / np.float32(DETER_SCALE)
        return found

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
        paths = sorted(path for path in directory.glob("*") if path.name != ".gitignore" and path.suffix != ".json")
        if not paths:
            raise ChunkError(f"{directory}: holds no replay chunks; make them (dvc repro) or fetch them (dvc pull)")
        self._read(paths)
        self._index()

    def _read(self, paths: Sequence[Path]) -> None:
        with ThreadPoolExecutor() as threads:
            for chunk in threads.map(Chunk.load, paths):
                self._append(chunk)

    def state_dict(self, contexts: bool = True) -> dict[str, Any]:
        """The written chunks' names, the others' content, and the contexts of both, which only more training needs."""
        written, growing = ([chunk for chunk in self._chunks if bool(chunk.file) is has] for has in (True, False))
        state = {
            "files": [chunk.file for chunk in written],
            "streams": self._growing,
            "growing": [{"stream": chunk.stream, "start": chunk.start, **chunk.arrays()} for chunk in growing],
        }
        if contexts:
            state["contexts"] = [chunk.context and vars(chunk.context) for chunk in (*written, *growing)]
        return state

    def load_state_dict(self, state: dict[str, Any], *directories: Path) -> None:
        """Replaces the content; written chunks are looked for in `directories`.

        Raises:
            ChunkError: one of them is missing or damaged
        """
        self._chunks, self._last, self._growing = [], {}, tuple(state["streams"])
        paths = []
        for name in state["files"]:
            path = next((path for directory in directories if (path := directory / name).is_file()), None)
            if path is None:
                raise ChunkError(
                    f"{directories[-1] / name}: missing, and the checkpoint needs it; remove that to start afresh"
                )
            paths.append(path)
        self._read(paths)
        for saved in state["growing"]:
            arrays = {name: np.asarray(saved[name]) for name in ("obs", "action", "reward", "flags")}
            chunk = Chunk.empty(saved["stream"], saved["start"], self.config.chunk_length, arrays["obs"].shape[1:])
            chunk.length = len(arrays["obs"])
            for name, filled in chunk.arrays().items():
                filled[:] = arrays[name]
            self._append(chunk)
        for chunk, context in zip(self._chunks, state.get("contexts", ()), strict=False):
            chunk.context = context and Context(**{name: np.array(part) for name, part in context.items()})
        self._index()
