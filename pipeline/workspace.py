"""The repository while a run of the pipeline is at work in it: one run at a time, and parameters of that run alone."""

import contextlib
import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

LOCK, KEPT = Path(".mario/flow.json"), Path(".mario/overridden")
FILES = (Path("params.yaml"), Path("dvc.lock"))


class Claim:
    """The right to run the pipeline here, for as long as this process lives."""

    def __init__(self) -> None:
        LOCK.parent.mkdir(exist_ok=True)
        self._file = LOCK.open("a+")

    def holder(self) -> dict[str, Any]:
        """Who has it, or had it and ended without giving it back; empty if that is nobody."""
        self._file.seek(0)
        text = self._file.read()
        return json.loads(text) if text else {}

    def take(self, note: dict[str, Any]) -> dict[str, Any] | None:
        """The note of one who ended without giving it back, empty without one; None if another run has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        dead = self.holder()
        self._write(json.dumps(note))
        return dead

    def give_back(self) -> None:
        self._write("")
        self._file.close()

    def _write(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()


@contextlib.contextmanager
def overridden(profile: str | None, overrides: Sequence[str], before_return: Callable[[], None]) -> Iterator[None]:
    """params.yaml with these changes, for the block; then all is put back, results included (DVC keeps the others).

    Args:
        overrides: NAME=VALUE each; what the profile in force can set is set there, so that it holds
        before_return: called within, when the block went well

    Raises:
        UserError: there is no such profile, or an override is no NAME=VALUE
    """
    put_back()  # what a run that was killed could not
    if profile is None and not overrides:
        yield
        before_return()
        return
    KEPT.mkdir(parents=True)
    for path in FILES:
        if path.exists():
            shutil.copy2(path, KEPT / path.name)
    try:
        change(FILES[0], profile, overrides)
        yield
        before_return()
    finally:
        put_back()


def put_back() -> None:
    if not (KEPT / FILES[0].name).exists():
        shutil.rmtree(KEPT, ignore_errors=True)
        return
    for path in FILES:
        kept = KEPT / path.name
        shutil.copy2(kept, path) if kept.exists() else path.unlink(missing_ok=True)
    if FILES[1].exists():  # what has never run has nothing to check out
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "checkout", "--force", "--quiet", "--allow-missing"]
        subprocess.run(command, check=False)
    shutil.rmtree(KEPT)


def change(path: Path, profile: str | None, overrides: Sequence[str]) -> None:
    """Sets values in a parameter file; its comments stay.

    Raises:
        UserError: see `overridden`
    """
    from dvc.utils.serialize import modify_yaml

    with modify_yaml(path) as values:
        if profile is not None:
            if profile not in values["profiles"]:
                known = ", ".join(values["profiles"])
                raise UserError(f"profile: unknown profile {profile!r}; known: {known}")
            values["profile"] = profile
        for override in overrides:
            name, equals, text = override.partition("=")
            *groups, last = name.split(".")
            if not equals or not last:
                raise UserError(f"{override!r}: expected NAME=VALUE, train.steps=20000 for instance")
            in_profile = bool(groups) and groups[0] in values["profiles"][values["profile"]]
            target = values["profiles"][values["profile"]] if in_profile else values
            for group in groups:
                target = target.setdefault(group, {})
            target[last] = yaml.safe_load(text)
