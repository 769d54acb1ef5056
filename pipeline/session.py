"""A command with all its children, in a session of its own: nothing of it outlives the one that started it.

`python -m pipeline.session COMMAND ...` becomes the command, which gets SIGTERM when the one above dies.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1


class Session:
    """The command runs from here on.

    Args:
        on_text: gets stderr as it comes, and stdout unless that goes to the file `stdout`
    """

    def __init__(
        self, command: Sequence[str], env: dict[str, str], on_text: Callable[[bytes], None], stdout: IO | None = None
    ):
        self._on_text = on_text
        self._stopping, self._stopped = threading.Lock(), False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.session", *command],
            env=env,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=stdout or subprocess.PIPE,
            stderr=subprocess.PIPE if stdout else subprocess.STDOUT,
            bufsize=0,
        )

    def wait(self) -> int:
        """Passes the output on until it ends, and returns the exit code."""
        pipe = self._process.stdout or self._process.stderr
        while chunk := pipe.read(65536):
            self._on_text(chunk)
        return self._process.wait()

    def stop(self, seconds: float) -> None:
        """Ctrl-C for all of it, once: DVC lets its command end first. What is left after `seconds` is killed."""
        with self._stopping:  # a second signal would tell a stage to stop without saving
            if self._stopped:
                return
            self._stopped = True
            self._signal(signal.SIGINT)
            end = time.monotonic() + seconds
            while self._signal(0) and time.monotonic() < end:
                self._process.poll()
                time.sleep(0.05)
            self._signal(signal.SIGKILL)

    def _signal(self, signum: int) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)
            return True
        return False


def main() -> None:
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored below a shell's `&`, and then by every child, too
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if os.getppid() == parent:
        os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
