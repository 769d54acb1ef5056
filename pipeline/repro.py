"""One stage by DVC, as a run of the pipeline sees it: what became of it, and why."""

import re
import time
from collections import deque
from collections.abc import Callable, Sequence

from pipeline.errors import TryAgain, UserError

CACHED, RESTORED, RAN = "Cached", "Restored", "Ran"
PROMOTED, REFUSED = "Promoted", "Refused"
LOCKED = re.compile(r"Unable to acquire lock|is busy, it is being blocked by|database is locked", re.IGNORECASE)
PROGRESS_EVERY = 15.0  # seconds between two lines of a progress bar in a log
NOISE = re.compile(
    r"^(nanobind:| - (leaked|\.\.\.)|See https://nanobind|To (track|enable)|\s+(git|dvc) |Use `dvc push`)"
)


class StageFailed(UserError):
    """The stage's own words, or DVC's."""


def command(stage: str, force: bool = False) -> list[str]:
    return ["dvc", "--wait-for-lock", "repro", "--single-item", *(["--force"] if force else []), stage]


def outcome(lines: Sequence[str], code: int) -> str:
    """What DVC did, of the lines that it and its stage wrote and its exit code.

    Raises:
        TryAgain: the engine or a lock was in the way
        StageFailed: anything else
    """
    text = "\n".join(lines)
    if code:
        said = reason(lines) or f"ended with exit code {code}"
        if re.search(rf"exited with {TryAgain.exit_code}\b", text) or LOCKED.search(text):
            raise TryAgain(said)
        raise StageFailed(said)
    if "skipping run, checking out outputs" in text:
        return RESTORED
    return RAN if "Running stage" in text else CACHED


def judged(lines: Sequence[str], code: int) -> tuple[str, str]:
    """What `mario promote` decided and why, of its lines and its exit code. Being refused is no failure.

    Raises:
        StageFailed: it could not decide
    """
    verdicts = [line.partition(": ") for line in lines if line.startswith(("PASS: ", "FAIL: "))]
    why = "; ".join(words for _, _, words in verdicts)
    if not code:
        return PROMOTED, why
    if verdicts:
        return REFUSED, why
    raise StageFailed(reason(lines) or f"ended with exit code {code}")


def reason(lines: Sequence[str]) -> str:
    """Why it failed, in one line: the stage's own words come first, then an exception's, then DVC's."""
    for pattern in (r"error: (.+)", r"([\w.]+(?:Error|Exception|Diverged)\b.*)", r"ERROR: (.+)", r"(\S.*)"):
        if found := [match[1] for line in lines if (match := re.match(pattern, line))]:
            return found[-1][:500]
    return ""


class Output:
    """Takes the bytes of a terminal's text; `say` gets its lines, of progress bars one in a while."""

    def __init__(self, say: Callable[[str], None]):
        self.lines: deque[str] = deque(maxlen=400)
        self._say, self._rest, self._last = say, b"", time.monotonic()

    def __call__(self, chunk: bytes) -> None:
        *whole, self._rest = re.split(rb"(?<=[\r\n])", self._rest + chunk)
        for piece in whole:
            line = piece.decode(errors="replace").rstrip()
            if not line or NOISE.match(line):
                continue
            if piece.endswith(b"\n"):
                self.lines.append(line)
                self._say(line)
            elif time.monotonic() - self._last > PROGRESS_EVERY:
                self._last = time.monotonic()
                self._say(line)

    def close(self) -> None:
        if self._rest:
            self(b"\n")
