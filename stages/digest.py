"""Hashes that tell whether files are the ones they were."""

import hashlib
import json
from pathlib import Path

MADE_LATER = (
    "registered_model_meta",
    "__pycache__",
)  # by whoever downloads or loads an MLflow model


def sha256(path: Path) -> str:
    return _of_file(path, "sha256")


def tree_sha256(directory: Path) -> str:
    """Of every file below a directory, names included: one changed, missing or added byte gives another hash."""
    whole = hashlib.sha256()
    for path in _files(directory):
        if not set(path.relative_to(directory).parts) & set(MADE_LATER):
            whole.update(f"{path.relative_to(directory).as_posix()}\0{sha256(path)}\n".encode())
    return whole.hexdigest()


def dvc_md5(path: Path) -> str | None:
    """What dvc.lock and DVC's cache call a file or a directory; None where there is none."""
    if path.is_file():
        return _of_file(path, "md5")
    if not path.is_dir():
        return None
    listed = [{"md5": _of_file(file, "md5"), "relpath": file.relative_to(path).as_posix()} for file in _files(path)]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def _files(directory: Path) -> list[Path]:
    found = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(directory).as_posix())


def _of_file(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()
