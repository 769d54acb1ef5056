"""Work in progress: kept outside DVC's outs, which DVC deletes, and keyed by a hash of all that determines the result.

The same inputs go on where they were; changed inputs start afresh, beside what is unfinished.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(".mario/progress")


class ProgressError(RuntimeError):
    """Another process is at work on the same inputs."""


def fingerprint(params: dict[str, Any], data: str) -> str:
    """Of parameters, input data and code: this project's modules that are loaded, and torch's version."""
    digest = hashlib.sha256(json.dumps([params, data], sort_keys=True).encode())
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] in ("dreamer", "stages") and getattr(module, "__file__", None):
            digest.update(name.encode() + Path(module.__file__).read_bytes())
    if torch := sys.modules.get("torch"):
        digest.update(torch.__version__.encode())
    return digest.hexdigest()[:16]


class Progress:
    """The directory of one stage's work on one set of inputs, locked while this object lives.

    `notes` is a small JSON document beside the work: whatever must be known before the work itself is read.

    Raises:
        ProgressError: another process holds the lock
    """

    def __init__(self, stage: str, key: str):
        self.stage, self.path = stage, ROOT / f"{stage}-{key}"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            pid = self._lock.read().strip() or "unknown"
            raise ProgressError(
                f"{stage}: process {pid} is already at work on these inputs; wait for it or end it"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        self._notes = self.path / "notes.json"
        self.notes: dict[str, Any] = json.loads(self._notes.read_text()) if self._notes.exists() else {}
        if self.notes.get("finished") and self.notes.get("locked") != _locked(stage):
            self.clear()  # DVC has taken the result over since: whoever runs the stage again wants it anew

    def note(self, **values: Any) -> None:
        self.notes.update(values)
        temporary = self._notes.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.notes, indent=1))
        temporary.replace(self._notes)

    def begin(self) -> list[Path]:
        """Marks the start of fresh work. Removes other work of this stage that is finished; returns what is not."""
        self.note(locked=_locked(self.stage), finished=False)
        unfinished = []
        for other in ROOT.glob(f"{self.stage}-*"):
            if other != self.path and (other / "notes.json").exists():
                if json.loads((other / "notes.json").read_text()).get("finished"):
                    shutil.rmtree(other)
                else:
                    unfinished.append(other)
        return unfinished

    def finish(self) -> None:
        """Marks the work as done. It stays until DVC has recorded the outs, in case that is prevented."""
        self.note(finished=True)

    def clear(self) -> None:
        for path in self.path.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.notes = {}


def publish(files: list[Path], directory: Path) -> None:
    """Makes `directory` hold exactly these files, as hard links where the disk allows. Swapped in whole."""
    fresh = directory.with_name(directory.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for file in files:
        try:
            os.link(file, fresh / file.name)
        except OSError:
            shutil.copy2(file, fresh / file.name)
    if directory.exists():
        shutil.rmtree(directory)
    fresh.rename(directory)


def _locked(stage: str) -> Any:
    """What dvc.lock says of a stage; it changes when DVC records the stage's outs."""
    lock = Path("dvc.lock")
    return ((yaml.safe_load(lock.read_text()) or {}).get("stages") or {}).get(stage) if lock.exists() else None
