"""Copies of this repository that a test may change, and its commands as a user runs them."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = ("MARIO_", "DVC_", "MLFLOW_", "PREFECT_")  # what a run that starts these tests may have set

TINY = """
  tiny:
    env: {time_limit: 30}
    collect: {steps: 512}
    archive: {}
    replay: {chunk_length: 64}
    model: {deter: 16, stoch: 4, classes: 4, hidden: 16, depth: 2, units: 16, layers: 1}
    losses: {}
    behavior: {imag_horizon: 3}
    optimizers: {}
    compute: {device: cpu}
    train:
      steps: 640
      batch_size: 2
      batch_length: 8
      train_ratio: 8
      eval_every: 64
      eval_episodes: 1
      checkpoint_every: 64
      log_every: 32
    evaluate: {episodes: 2}
    render: {sequences: 1, fps: 10}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """Of a command that this Python's tools are found by first, and that inherits no settings of ours."""
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
    return kept | ours | (env or {})


def run(
    tree: Path, *command: str, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """A command in `tree`, found beside this Python first; `python` is this one."""
    return subprocess.run(command, cwd=tree, env=environment(env), capture_output=True, text=True, timeout=timeout)


def repository(target: Path) -> Path:
    """A copy with the profile tiny in force, committed to a git repository of its own."""
    tree = copy(target)
    edit(tree, "\nprofile: debug\n", "\nprofile: tiny\n")
    with (tree / "params.yaml").open("a") as file:
        file.write(TINY)
    assert run(tree, "git", "init", "-q", ".").returncode == 0
    commit(tree)
    return tree


def edit(tree: Path, old: str, new: str) -> None:
    """Of params.yaml."""
    path = tree / "params.yaml"
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def commit(tree: Path) -> None:
    done = run(tree, "bash", "-c", "git add -A && git commit -q -m state")
    assert done.returncode == 0, done.stdout + done.stderr
