"""Ctrl-C and SIGTERM ask a stage to stop at the next good moment; a second one stops it at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupt:
    """`signum` is None until a signal came."""

    signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        return 128 + (self.signum or 0)


@contextmanager
def graceful() -> Iterator[Interrupt]:
    """Within it, the first SIGINT or SIGTERM is noted instead of raised."""
    interrupt = Interrupt()

    def note(signum: int, frame: object) -> None:
        if interrupt:
            raise KeyboardInterrupt
        interrupt.signum = signum
        print(
            f"\n{signal.Signals(signum).name}: saving, then stopping (once more: at once)", file=sys.stderr, flush=True
        )

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
