"""The group `runner` of params.yaml: where and how long stages run. No result depends on it, so no stage tracks it."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from pipeline.errors import UserError

PATH = Path("params.yaml")
SIZE = re.compile(r"[1-9]\d*[kmg]")


@dataclass(frozen=True)
class Runner:
    """Values are checked; params.yaml says what each means."""

    memory: str
    shared_memory: str
    gpus: str | int
    stop_seconds: float
    minutes: float


def load(path: Path = PATH) -> Runner:
    """Reads the group.

    Raises:
        UserError: the file or the group is missing, or a value is wrong; names it
    """
    try:
        group = yaml.safe_load(path.read_text())["runner"]
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from the repository's root") from None
    except (yaml.YAMLError, TypeError, KeyError):
        raise UserError(f"{path}: no group 'runner' in it; restore it (git checkout {path})") from None
    names = [field.name for field in fields(Runner)]
    if not isinstance(group, dict) or sorted(map(str, group)) != sorted(names):
        raise UserError(f"{path}: runner: must have exactly {', '.join(names)}")
    for name, right, expected in (
        ("memory", _none(group["memory"]) or _size(group["memory"]), "0, or a size such as 8g or 500m"),
        ("shared_memory", _size(group["shared_memory"]), "a size such as 1g or 500m"),
        ("gpus", group["gpus"] in ("auto", "all", "none") or _count(group["gpus"]), "auto, all, none or a number"),
        ("stop_seconds", _number(group["stop_seconds"]) and group["stop_seconds"] > 0, "a positive number"),
        ("minutes", _number(group["minutes"]) and group["minutes"] >= 0, "a number, 0 for no limit"),
    ):
        if not right:
            raise UserError(f"{path}: runner.{name}: expected {expected}, got {group[name]!r}")
    return Runner(**group)


def promotes(path: Path = PATH) -> bool:
    """Whether a run's last step may promote by itself: `promote.automatic`, of the profile in force if it says so."""
    values = yaml.safe_load(path.read_text())
    of_profile = (values.get("profiles") or {}).get(values.get("profile")) or {}
    return bool({**(values.get("promote") or {}), **(of_profile.get("promote") or {})}.get("automatic"))


def _none(value: object) -> bool:
    return value == 0 and not isinstance(value, bool)


def _size(value: object) -> bool:
    return isinstance(value, str) and SIZE.fullmatch(value) is not None


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
