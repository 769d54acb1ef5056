"""The state of the code, as git knows it."""

import os
import subprocess

from stages import paths

# dvc.lock and the last verdict aside, which the pipeline writes itself
OWN = ("--", ".", ":(exclude)dvc.lock", ":(exclude)reports/promotion.json")


def state() -> tuple[str | None, bool | None]:
    """Commit of the code, and whether the code differs from it.

    Both None outside git's reach: an exported tree, or no git on this machine. In a container, which has none, the
    launcher says it in MARIO_GIT_COMMIT and MARIO_GIT_DIRTY.
    """
    if commit := os.environ.get("MARIO_GIT_COMMIT"):
        return commit, os.environ.get("MARIO_GIT_DIRTY") == "true"
    if not (paths.ROOT / ".git").exists():
        return None, None
    try:
        commit = _git("rev-parse", "HEAD")
        return commit, bool(_git("status", "--porcelain", *OWN))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def changes() -> list[str]:
    """The files that `state` calls different, as paths from the root; nothing outside git's reach."""
    try:
        lines = _git("status", "--porcelain", *OWN).splitlines() if (paths.ROOT / ".git").exists() else []
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.split(maxsplit=1)[1] for line in lines]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(paths.ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
