"""`mario status`: which stages are up to date and why not, what goes on where it stopped, and the latest numbers."""

import csv
import fcntl
import json
from pathlib import Path
from typing import Any

import yaml

from pipeline import demo, graph
from pipeline.errors import UserError

PROGRESS, SUMMARY = Path(".mario/progress"), Path("reports/training/summary.json")


def describe() -> str:
    """A short text for people.

    Raises:
        UserError: DVC cannot tell; with its own words
        GraphError: this is not the repository's root
    """
    stages, changes, known = graph.load(), changed(), locked()
    lines = [
        f"{name:<9} {'up to date' if name not in changes else why(changes[name]) if name in known else 'not run yet'}"
        for name in stages
    ]
    lines += [unfinished(path) for path in sorted(PROGRESS.glob("*/notes.json"))]
    if SUMMARY.exists():
        lines.append(trained(json.loads(SUMMARY.read_text())))
    if demo.EVALUATION.exists():
        lines.append(demo.headline())
    return "\n".join(line for line in lines if line)


def locked() -> set[str]:
    """The stages that have run before."""
    return set((yaml.safe_load(demo.LOCK.read_text()) or {}).get("stages", {})) if demo.LOCK.exists() else set()


def changed() -> dict[str, list[Any]]:
    """DVC's status: of each stage that is not up to date, what changed."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return {name.rpartition(":")[2]: changes for name, changes in repo.status().items()}
    except DvcException as error:
        raise UserError(f"dvc: {' '.join(str(error).split())}") from None


def why(changes: list[Any]) -> str:
    """DVC's list of changes as the names of files, parameters and outs."""
    named = []
    for change in changes:
        if not isinstance(change, dict):
            named.append(str(change))
            continue
        for entries in change.values():
            for path, state in entries.items():
                names = [path] if isinstance(state, str) else [key.removeprefix("profiles.") for key in state]
                named += [name if state not in ("deleted", "not in cache") else f"{name} ({state})" for name in names]
    shown = list(dict.fromkeys(named))
    return "changed: " + ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def unfinished(notes: Path) -> str:
    """A line for work in progress, none for work that is done."""
    if json.loads(notes.read_text()).get("finished"):
        return ""
    work = notes.parent
    stage, losses = work.name.rpartition("-")[0], work / "losses.csv"
    with losses.open() if losses.exists() else Path("/dev/null").open() as file:
        rows = list(csv.DictReader(file))
    reached = f" at {rows[-1]['frames']} frames" if rows else ""
    if _held(work / "lock"):
        return f"{stage} is running{reached} ({work})"
    return f"{stage} stopped{reached}; goes on there when it is run with the same inputs ({work})"


def _held(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def trained(summary: dict[str, Any]) -> str:
    return (
        f"trained {summary['frames']} frames, {summary['updates']} updates in {summary['hours']:.2f} h; "
        f"best return {summary['best_return']:.0f} at {summary['best_frames']} frames"
    )
