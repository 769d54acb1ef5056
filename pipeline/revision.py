"""The commit that is checked out. Stages on the host ask git themselves (stages/git.py); a container has no git."""

import subprocess
from pathlib import Path


def state() -> tuple[str, bool] | None:
    """Commit, and whether the files differ from it (dvc.lock aside, which the pipeline writes). None without git."""
    if not Path(".git").exists():
        return None
    try:
        return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--", ".", ":(exclude)dvc.lock"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
