"""What goes over the websocket to the page: one binary message a view."""

import json
import struct
from typing import Any

import numpy as np


def pack(numbers: dict[str, Any], pictures: dict[str, np.ndarray]) -> bytes:
    """Four bytes with the length of a JSON text (little-endian), the text, and the pictures' bytes one after the other.

    The text is `numbers` and, under "pictures", each one's name and shape (..., H, W, 3). Pictures are raw RGB: on
    loopback they cost less than it takes to compress them, and the page shows exactly what is there.
    """
    text = json.dumps({**numbers, "pictures": [[name, *each.shape] for name, each in pictures.items()]}).encode()
    return b"".join([struct.pack("<I", len(text)), text, *(each.tobytes() for each in pictures.values())])


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `pack`."""
    (length,) = struct.unpack_from("<I", message)
    numbers, start = json.loads(message[4 : 4 + length]), 4 + length
    pictures = {}
    for name, *shape in numbers.pop("pictures"):
        size = int(np.prod(shape))
        pictures[name] = np.frombuffer(message, np.uint8, size, start).reshape(shape)
        start += size
    return numbers, pictures
