"""The commit that is checked out. Stages on the host ask git themselves (stages/git.py); a container has no git."""

import subprocess
from pathlib import Path

# What the pipeline writes itself and is committed; the same in stages/git.py, a test compares.
OWN = ("--", ".", ":(exclude)dvc.lock", ":(exclude)reports/promotion.json")


def state() -> tuple[str, bool] | None:
    """Commit, and whether the files differ from it, as `stages.git.state` counts. None without git."""
    if not Path(".git").exists():
        return None
    try:
        return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", *OWN))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
