"""The open-loop prediction as a moving picture: what happened, what the world model imagined, and the difference."""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dreamer.replay import Batch, Replay

SCALE = 3  # screen pixels an observation's pixel
GAP = 4
HEADER = 24
TIMELINE = 10
BACKGROUND, TEXT, TRACK = (17, 20, 26), (236, 239, 244), (52, 58, 70)
SEEN, IMAGINED = (56, 189, 168), (245, 158, 66)  # the model's frame while it sees the truth, and once it imagines
_TRIES = 16


def sample_sequences(replay: Replay, count: int, length: int, rng: np.random.Generator) -> Batch:
    """`count` sequences of `length` steps, or of as many as the longest stream has.

    Those within one episode come first: no model can imagine the reset in the middle of another.

    Raises:
        ValueError: the replay has no two consecutive steps
    """
    while length > 2 and not replay.starts(length):
        length -= 1
    whole, rest = [], []
    for _ in range(_TRIES):
        batch = replay.sample(count, length, rng)
        crossing = batch.is_first[:, 1:].any(1)
        for i in range(count):
            (rest if crossing[i] else whole).append({name: array[i] for name, array in batch.arrays().items()})
        if len(whole) >= count:
            break
    chosen = [*whole, *rest][:count]
    return Batch(**{name: np.stack([sequence[name] for sequence in chosen]) for name in batch.arrays()})


def frames(truth: np.ndarray, model: np.ndarray, context: int) -> Iterator[np.ndarray]:
    """A row a sequence; columns truth, model and error (the brighter, the more it differs).

    The model's column is framed in green while it sees the truth and in orange once it imagines; the timeline below
    says how far each goes.

    Args:
        truth, model: (B, T, 64, 64, 3) uint8
        context: time steps that the model saw

    Yields:
        T frames, (H, W, 3) uint8
    """
    rows, steps, size = *truth.shape[:2], truth.shape[2] * SCALE
    columns = [GAP + i * (size + 2 * GAP) for i in range(3)]
    tops = [HEADER + GAP + i * (size + 2 * GAP) for i in range(rows)]
    width, bottom = columns[-1] + size + GAP, tops[-1] + size + GAP
    font = ImageFont.load_default(14)
    for t in range(steps):
        seen = t < context
        color = SEEN if seen else IMAGINED
        picture = Image.new("RGB", (width, bottom + TIMELINE), BACKGROUND)
        draw = ImageDraw.Draw(picture)
        labels = ("truth", "model sees" if seen else f"model imagines +{t - context + 1}", "error")
        for x, label in zip(columns, labels, strict=True):
            draw.text((x + 2, HEADER - 4), label, color if label.startswith("model") else TEXT, font, "ls")
        draw.rectangle((columns[1] - GAP, HEADER, columns[1] + size + GAP - 1, bottom - 1), color)
        for start, stop, shade in ((0, min(t + 1, context), SEEN), (context, t + 1, IMAGINED), (t + 1, steps, TRACK)):
            if start < stop:
                left, right = (width * edge // steps for edge in (start, stop))
                draw.rectangle((left, bottom + 4, right - 1, bottom + TIMELINE - 1), shade)
        frame = np.array(picture)
        error = np.abs(truth[:, t].astype(np.int16) - model[:, t]).max(-1, keepdims=True).astype(np.uint8)
        for row, top in enumerate(tops):
            images = truth[row, t], model[row, t], error[row].repeat(3, -1)
            for x, image in zip(columns, images, strict=True):
                frame[top : top + size, x : x + size] = image.repeat(SCALE, 0).repeat(SCALE, 1)
        yield frame
