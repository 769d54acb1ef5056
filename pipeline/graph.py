"""The stages of dvc.yaml: their names in an order in which they can run, and what each waits for."""

from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

import yaml

from pipeline.errors import UserError

PATH = Path("dvc.yaml")


class GraphError(UserError):
    """dvc.yaml is missing or not what we wrote. The message names the culprit and the remedy."""


def load(path: Path = PATH) -> dict[str, tuple[str, ...]]:
    """Every stage's name with those of the stages it needs, each after the ones it needs.

    Reads the file itself: DVC's own graph is the same (a test compares) and takes a second to import.

    Raises:
        GraphError: there is no such file, or it has no stages
    """
    stages = _read(path)
    makers = {out: name for name, stage in stages.items() for out in _outs(stage)}
    needs = {
        name: tuple({makers[out]: None for dep in stage.get("deps", ()) for out in makers if _overlap(dep, out)})
        for name, stage in stages.items()
    }
    return {name: needs[name] for name in TopologicalSorter(needs).static_order()}


def uses_gpu(name: str, path: Path = PATH) -> bool:
    """Whether the stage computes on a GPU where there is one."""
    return bool((_read(path)[name].get("meta") or {}).get("gpu"))


def _read(path: Path) -> dict[str, dict]:
    try:
        return dict(yaml.safe_load(path.read_text())["stages"])
    except FileNotFoundError:
        raise GraphError(f"{path}: not found; run from the repository's root") from None
    except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise GraphError(
            f"{path}: no stages in it ({' '.join(str(error).split())}); restore it (git checkout {path})"
        ) from None


def _outs(stage: dict) -> list[str]:
    listed = [out for key in ("outs", "metrics", "plots") for out in stage.get(key, ())]
    return [out if isinstance(out, str) else next(iter(out)) for out in listed]


def _overlap(dep: str, out: str) -> bool:
    inner, outer = PurePosixPath(dep), PurePosixPath(out)
    return inner.is_relative_to(outer) or outer.is_relative_to(inner)
