"""Copies of this repository that a test may change, and its commands as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = ("MARIO_", "DVC_", "MLFLOW_")  # what a run that starts these tests may have set


def copy(target: Path) -> Path:
    """All files that git does not ignore, as they are now; before any run, and with the profile debug."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True)
    if listed.returncode or not (ROOT / ".git").exists():  # an exported tree
        places = (
            "Makefile",
            "*.yaml",
            "*.toml",
            "*.lock",
            ".gitignore",
            ".dvcignore",
            ".dvc/config",
            ".dvc/.gitignore",
            "reports/promotion.json",
        )
        code = [f"{room}/**/*" for room in ("dreamer", "stages", "pipeline", "tests", "docker")]
        names = [str(path.relative_to(ROOT)) for place in (*places, *code) for path in ROOT.glob(place)]
    else:
        names = listed.stdout.decode().split("\0")
    for name in names:
        if (source := ROOT / name).is_file() and name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(source.read_bytes())
    params = target / "params.yaml"
    params.write_text(re.sub(r"(?m)^profile: \S+", "profile: debug", params.read_text()))
    return target


def run(
    tree: Path, *command: str, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """A command in `tree`, found beside this Python first; `python` is this one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OWN)}
    ours = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_STUDIO_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_AUTHOR_NAME": "test",
        "GIT_AUTHOR_EMAIL": "test@localhost",
        "GIT_COMMITTER_NAME": "test",
        "GIT_COMMITTER_EMAIL": "test@localhost",
    }
    return subprocess.run(
        command, cwd=tree, env=kept | ours | (env or {}), capture_output=True, text=True, timeout=timeout
    )
