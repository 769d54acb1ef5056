"""Animated GIFs: exact colours where a frame has at most 256, any whole rate on average, only what changed stored."""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from PIL import GifImagePlugin, Image

MAX_FPS = 50  # viewers play delays below 2/100 s at a tenth of the speed
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
    """`encode` into a file, under a temporary name until it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        with Writer(file, fps) as writer:
            for frame in frames:
                writer.add(frame)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Writer:
    """Encodes frame by frame into an open file, for where frames are pushed. Complete once closed.

    A GIF counts time in 1/100 s, so delays alternate (15 fps: 7, 7, 6) to keep the rate and never drift from it.
    """

    def __init__(self, file: BinaryIO, fps: int):
        if not 1 <= fps <= MAX_FPS:
            raise ValueError(f"a GIF shows 1 to {MAX_FPS} frames a second, not {fps}")
        self._file, self._fps = file, fps
        self._shown: np.ndarray | None = None  # (H, W) packed RGB, before any quantization
        self._count = 0

    def add(self, frame: np.ndarray) -> None:
        """One more (H, W, 3) uint8 frame; it is not kept nor changed."""
        packed = (frame[..., 0].astype(np.uint32) << 16) | (frame[..., 1].astype(np.uint32) << 8) | frame[..., 2]
        height, width = packed.shape
        if self._shown is None:
            screen = width.to_bytes(2, "little") + height.to_bytes(2, "little") + bytes(3)
            self._file.write(b"GIF89a" + screen + _LOOP_FOREVER)
            box, changed = (slice(0, height), slice(0, width)), np.ones((height, width), bool)
        elif packed.shape != self._shown.shape:
            raise ValueError(f"frame {self._count} has shape {packed.shape}, those before it {self._shown.shape}")
        else:
            box = _bounding_box(changed := packed != self._shown)
        end = [-(-100 * frames // self._fps) for frames in (self._count, self._count + 1)]
        self._file.write(_image(frame[box], packed[box], changed[box], (box[1].start, box[0].start), end[1] - end[0]))
        self._shown, self._count = packed, self._count + 1

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


def _image(rgb: np.ndarray, packed: np.ndarray, changed: np.ndarray, offset: tuple[int, int], hundredths: int) -> bytes:
    """One image block: all pixels, or the unchanged ones left transparent, whichever is smaller."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    if (colors := image.getcolors(256)) is None:
        image = image.quantize(255, dither=Image.Dither.NONE)
        index, palette = np.asarray(image), bytes(image.getpalette())[: 3 * 255]
    else:
        known = np.sort(np.array([(r << 16) | (g << 8) | b for _, (r, g, b) in colors], np.uint32))
        index = np.searchsorted(known, packed).astype(np.uint8)
        palette = b"".join(int(color).to_bytes(3, "big") for color in known)
    blocks = [_block(index, palette, offset, hundredths)]
    free = len(palette) // 3
    if free < 256 and not changed.all():
        cleared = np.where(changed, index, np.uint8(free))
        blocks.append(_block(cleared, palette + bytes(3), offset, hundredths, transparency=free))
    return min(blocks, key=len)


def _block(index: np.ndarray, palette: bytes, offset: tuple[int, int], hundredths: int, **transparency: int) -> bytes:
    image = Image.fromarray(index)
    image.putpalette(palette)
    parameters = {"duration": 10 * hundredths, "disposal": 1, "include_color_table": True, **transparency}
    return b"".join(GifImagePlugin.getdata(image, offset, **parameters))
