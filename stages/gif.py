"""Animated GIFs: exact colours where a frame has at most 256, the asked rate on average, only what changed stored."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from PIL import GifImagePlugin, Image

MAX_FPS = 50  # viewers play delays below 2/100 s at a tenth of the speed
TOLERANCE = 8  # levels of 255, in frames that cannot be exact
_LOOP_FOREVER = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"


def encode(frames: Iterable[np.ndarray], fps: int) -> bytes:
    """An endlessly looping GIF of (H, W, 3) uint8 RGB frames, `fps` of them a second. Holds two frames at a time.

    Raises:
        ValueError: there is no frame, their sizes differ, or `fps` is not in 1..50
    """
    buffer = io.BytesIO()
    with Writer(buffer, fps) as writer:
        for frame in frames:
            writer.add(frame)
    return buffer.getvalue()


def write(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """`encode` into a file."""
    with create(path, fps) as writer:
        for frame in frames:
            writer.add(frame)


@contextmanager
def create(path: Path, fps: int) -> "Iterator[Writer]":
    """A `Writer` into a file that appears under its name once the block ends, and not at all if it fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file, Writer(file, fps) as writer:
            yield writer
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Writer:
    """Encodes frame by frame into an open file, for where frames are pushed. Complete once closed.

    A GIF counts time in 1/100 s, so delays alternate (15 fps: 7, 7, 6) to keep the rate and never drift from it. A
    frame of more than 256 colours is quantized, and what differs from the one shown by at most TOLERANCE stays.
    """

    def __init__(self, file: BinaryIO, fps: int):
        if not 1 <= fps <= MAX_FPS:
            raise ValueError(f"a GIF shows 1 to {MAX_FPS} frames a second, not {fps}")
        self._file, self._fps = file, fps
        self._shown: np.ndarray | None = None  # (H, W, 3), before any quantization
        self._exact = True  # so far, all that is shown
        self._count = 0

    def add(self, frame: np.ndarray) -> None:
        """One more (H, W, 3) uint8 frame; it is not changed."""
        exact = Image.fromarray(frame).getcolors(256) is not None
        if self._shown is None:
            height, width = frame.shape[:2]
            screen = width.to_bytes(2, "little") + height.to_bytes(2, "little") + bytes(3)
            self._file.write(b"GIF89a" + screen + _LOOP_FOREVER)
            changed = np.ones((height, width), bool)
        elif frame.shape != self._shown.shape:
            raise ValueError(f"frame {self._count} has shape {frame.shape}, those before it {self._shown.shape}")
        elif not exact:
            changed = np.abs(frame.astype(np.int16) - self._shown).max(-1) > TOLERANCE
            frame = np.where(changed[..., None], frame, self._shown)
        else:
            changed = (frame != self._shown).any(-1) | (not self._exact)
        rows, columns = _bounding_box(changed)
        hundredths = -(-100 * (self._count + 1) // self._fps) + (-100 * self._count // self._fps)
        box = rows, columns
        self._file.write(_image(frame[box], changed[box], (columns.start, rows.start), hundredths))
        self._shown, self._exact, self._count = frame.copy(), exact, self._count + 1

    def close(self) -> None:
        if not self._count:
            raise ValueError("an animation needs at least one frame")
        self._file.write(b";")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Of what is true; one pixel where nothing is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return slice(0, 1), slice(0, 1)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _image(frame: np.ndarray, changed: np.ndarray, offset: tuple[int, int], hundredths: int) -> bytes:
    """One image block: all pixels, or the unchanged ones left transparent, whichever is smaller."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    if (colors := image.getcolors(256)) is None:
        image = image.quantize(255, dither=Image.Dither.NONE)
        index, palette = np.asarray(image), bytes(image.getpalette())
    else:
        weights = np.array([1 << 16, 1 << 8, 1], np.uint32)
        known = np.sort(np.array([color for _, color in colors], np.uint32) @ weights)
        index = np.searchsorted(known, frame @ weights).astype(np.uint8)
        palette = b"".join(int(color).to_bytes(3, "big") for color in known)
    free = len(palette) // 3  # a number that no pixel has
    blocks = [_block(index, palette, offset, hundredths)]
    if free < 256 and not changed.all():
        cleared = np.where(changed, index, np.uint8(free))
        blocks.append(_block(cleared, palette + bytes(3), offset, hundredths, transparency=free))
    return min(blocks, key=len)


def _block(index: np.ndarray, palette: bytes, offset: tuple[int, int], hundredths: int, **transparency: int) -> bytes:
    image = Image.fromarray(index)
    image.putpalette(palette)
    parameters = {"duration": 10 * hundredths, "disposal": 1, "include_color_table": True, **transparency}
    return b"".join(GifImagePlugin.getdata(image, offset, **parameters))
