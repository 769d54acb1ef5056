"""The open-loop prediction as a moving picture: what happened, and what the world model imagined."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dreamer.replay import Batch, Replay

SCALE, SMALL = 3, 2  # screen pixels an observation's pixel; of pictures with many columns
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


def windows(episode: Batch, count: int, length: int) -> Batch:
    """`count` sequences of `length` steps, or of as many as there are, evenly spread over one episode, (1, T)."""
    steps = episode.is_first.shape[1]
    length = min(length, steps)
    firsts = np.unique(np.linspace(0, steps - length, count).round().astype(int))
    return Batch(**{name: np.stack([x[0, t : t + length] for t in firsts]) for name, x in episode.arrays().items()})


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
    error = np.abs(truth.astype(np.int16) - model).max(-1, keepdims=True).astype(np.uint8).repeat(3, -1)

    def labels(t: int) -> tuple[str, str, str]:
        return "truth", "model sees" if t < context else f"model imagines +{t - context + 1}", "error"

    return _grid([truth, model, error], {1}, labels, context, SCALE)


def learning_frames(truth: np.ndarray, models: Mapping[int, np.ndarray], context: int) -> Iterator[np.ndarray]:
    """As `frames`, with a column for each of several models of one training run, by the percentage of it done."""
    names = tuple(f"after {percent}%" for percent in models)

    def labels(t: int) -> tuple[str, ...]:
        return f"truth +{t - context + 1}" if t >= context else "truth", *names

    return _grid([truth, *models.values()], set(range(1, len(models) + 1)), labels, context, SMALL)


def _grid(
    columns: Sequence[np.ndarray],
    framed: Container[int],
    labels: Callable[[int], Sequence[str]],
    context: int,
    scale: int,
) -> Iterator[np.ndarray]:
    rows, steps, size = *columns[0].shape[:2], columns[0].shape[2] * scale
    lefts = [GAP + i * (size + 2 * GAP) for i in range(len(columns))]
    tops = [HEADER + GAP + i * (size + 2 * GAP) for i in range(rows)]
    width, bottom = lefts[-1] + size + GAP, tops[-1] + size + GAP
    font = ImageFont.load_default(14)
    for t in range(steps):
        color = SEEN if t < context else IMAGINED
        picture = Image.new("RGB", (width, bottom + TIMELINE), BACKGROUND)
        draw = ImageDraw.Draw(picture)
        for i, (x, label) in enumerate(zip(lefts, labels(t), strict=True)):
            draw.text((x + 2, HEADER - 4), label, color if i in framed else TEXT, font, "ls")
            if i in framed:
                draw.rectangle((x - GAP, HEADER, x + size + GAP - 1, bottom - 1), color)
        for start, stop, shade in ((0, min(t + 1, context), SEEN), (context, t + 1, IMAGINED), (t + 1, steps, TRACK)):
            if start < stop:
                left, right = (width * edge // steps for edge in (start, stop))
                draw.rectangle((left, bottom + 4, right - 1, bottom + TIMELINE - 1), shade)
        frame = np.array(picture)
        for row, top in enumerate(tops):
            for x, column in zip(lefts, columns, strict=True):
                frame[top : top + size, x : x + size] = column[row, t].repeat(scale, 0).repeat(scale, 1)
        yield frame
