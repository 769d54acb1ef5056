"""`python -m stages NAME [arguments]` runs one script. An error that a user can cause becomes one line, exit code 1."""

import errno
import gc
import importlib
import os
import signal
import sys
from pathlib import Path

from stages.allocator import keep_freed_memory

SCRIPTS = (
    "collect",
    "train",
    "evaluate",
    "render",
    "report",
    "play",
    "compare",
    "verify",
    "bench",
    "evidence",
    "export",
    "enroll",
)

# By name: importing their modules to compare types would load torch before an error in params.yaml is told.
TOLD = {
    "dreamer.config.ConfigError",
    "dreamer.replay.ChunkError",
    "dreamer.checkpoint.CheckpointError",
    "dreamer.team.WorkerError",
    "stages.progress.ProgressError",
    "stages.report.ReportError",
    "stages.render.RenderError",
    "stages.live.errors.LiveError",
    "stages.address.TrackingError",
    "stages.bundle.BundleError",
    "stages.watch.Diverged",
}


def main() -> None:
    # Before torch is loaded: its threads spin while they wait for each other, which on shared cores takes up to 15
    # times as long. A short spin is best; it goes before OMP_WAIT_POLICY, which could only choose a long one or none.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves every `with` on its way out
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        given = repr(sys.argv[1]) if len(sys.argv) > 1 else "none given"
        sys.exit(f"error: unknown stage {given}; known: {', '.join(SCRIPTS)}")
    name = sys.argv.pop(1)
    sys.argv[0] = name
    try:
        if name != "play":  # which must tell its --help even then
            from stages import params

            params.load()  # before the stage's module, whose imports take seconds
        keep_freed_memory()
        importlib.import_module(f"stages.{name}").main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if (line := told(error)) is None:
            raise
        sys.exit(f"error: {line}")
    finally:
        # Else Python, on its way out, searches all that MLflow and torch made for garbage: a second or two. But what is
        # frozen is not freed, and Triton, which comes with the first optimizer, prints a page about each leak.
        if "triton" not in sys.modules:
            gc.freeze()


def told(error: Exception) -> str | None:
    """The one line for an error whose cause lies with the user or the machine, None for one that is ours."""
    if any(f"{kind.__module__}.{kind.__qualname__}" in TOLD for kind in type(error).__mro__):
        return " ".join(str(error).split())
    if not isinstance(error, OSError):
        return None
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return (
            f"{where}the disk is full; free some space there (dvc gc --workspace drops old versions) and run it again"
        )
    if not error.filename:
        return None
    if isinstance(error, PermissionError):
        owner = Path(error.filename) if Path(error.filename).exists() else Path(error.filename).parent
        return f"{where}no permission; make {owner} readable and writable for you (ls -ld {owner} shows its owner)"
    if isinstance(error, FileNotFoundError):
        return f"{where}not found; make it (dvc repro) or fetch it (dvc pull)"
    return f"{where}{error.strerror or error}"


if __name__ == "__main__":
    main()
