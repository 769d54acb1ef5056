"""Claims on things that a process holds for as long as it lives, however it ends: locked files with a note in them."""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


class Claim:
    """A file `<name>.json` with `note` in it, locked until `release` or the end of the process."""

    def __init__(self, folder: Path, name: str, note: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{name}.json").open("w")
        _lock(self._file)
        self._file.write(json.dumps(note))
        self._file.flush()

    def release(self) -> None:
        Path(self._file.name).unlink(missing_ok=True)
        self._file.close()


def abandoned(folder: Path, tracking_uri: str) -> Iterator[dict[str, Any]]:
    """The notes on `tracking_uri` whose claimants ended without releasing them. Their files are removed."""
    for path in folder.glob("*.json"):
        with path.open("r+") as file:
            if not _lock(file):
                continue
            text = file.read()
            note = json.loads(text) if text else {}  # empty: it ended between the two
            if note.get("tracking_uri") == tracking_uri:
                yield note
                path.unlink()


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
