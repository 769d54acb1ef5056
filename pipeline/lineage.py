"""`mario lineage` and `mario reproduce`: where a registered model comes from, and how to build it again."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.registry import MODEL, Registry

PARAMS = Path("params.yaml")


def show(which: str, as_json: bool) -> str:
    """All that is known of a version."""
    registry = Registry()
    version = registry.version(which)
    known = {
        "version": str(version.version),
        "champion": registry.champion() == str(version.version),
        **{key: version.tags.get(key) for key in ("artifact_sha256", "weights_sha256")},
        "gate": {key[5:]: value for key, value in version.tags.items() if key.startswith("gate.")},
        **recorded(registry, version),
    }
    if as_json:
        return json.dumps(known, indent=1)
    params = known.pop("params")
    lines = [f"{MODEL} version {known.pop('version')}", *_lines(known)]
    lines.append(f"parameters ({len(list(_flat(params)))})")
    return "\n".join(lines + _lines(params))


def recorded(registry: Registry, version: Any) -> dict[str, Any]:
    """The lineage that was registered with a version.

    Raises:
        UserError: it has none, or the store cannot give it
    """
    import mlflow

    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_registry_uri(registry.uri)
    with tempfile.TemporaryDirectory(prefix="mario-lineage-") as folder:
        uri = f"models:/{MODEL}/{version.version}/artifacts/bundle/config.json"
        try:
            path = mlflow.artifacts.download_artifacts(uri, dst_path=folder)
            found = json.loads(Path(path).read_text())["lineage"]
        except Exception as error:  # of MLflow, its store or the file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"version {version.version}: its lineage cannot be read ({reason})") from None
    if not found:
        raise UserError(f"version {version.version} was registered without lineage; the stage evaluate records it")
    return found


def reproduce(which: str, run: bool, directory: Path | None) -> int:
    """Prints the commands that build a version again, or runs them in a clone beside this repository.

    Raises:
        UserError: the version's commit is unknown or not in this repository; the directory is there already
    """
    registry = Registry()
    version = registry.version(which)
    known = recorded(registry, version)
    commit, trained = known["trained"]["commit"], known["trained"]
    if not commit:
        raise UserError(f"version {version.version} was trained outside git, so its code is not known")
    target = directory or Path.cwd().parent / f"{Path.cwd().name}-version-{version.version}"
    changes, uncommitted = overrides(known["params"], at_commit(commit)), _uncommitted(known)
    told = [f"# {MODEL} version {version.version}, trained {trained['finished']} on {trained['hardware']['cpu']}"]
    if uncommitted:
        told.append(f"# Not exactly: the code had changes that no commit holds, in {', '.join(uncommitted)}.")
    if image := known["environment"].get("image") or trained.get("image"):
        told.append(f"# It ran in the image {image}.")
    runner = "MARIO_RUNNER=docker " if image else ""
    steps = [
        ["git", "clone", "--quiet", str(Path.cwd()), str(target)],
        ["cd", str(target)],
        ["git", "checkout", "--quiet", "--detach", commit],
        ["make", "setup"],
        [".venv/bin/dvc", *(["exp", "run", *(f"-S{change}" for change in changes)] if changes else ["repro"])],
    ]
    lines = [shlex.join(step) for step in steps]
    lines[-1] = runner + lines[-1]
    print("\n".join([*told, *lines]), flush=True)
    if not run:
        return 0
    if target.exists():
        raise UserError(f"{target}: is there already; remove it, or name another (--directory)")
    return _run(steps, target, {**known, "weights_sha256": version.tags.get("weights_sha256")}, runner)


def _run(steps: list[list[str]], target: Path, known: dict[str, Any], runner: str) -> int:
    """Runs them with this environment instead of a new one, and compares the weights."""
    tools = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    env.pop("MLFLOW_TRACKING_URI", None)  # it registers in the clone, not among the versions here
    if runner:
        env["MARIO_RUNNER"] = "docker"
    for command, where in (
        (steps[0], Path.cwd()),
        (steps[2], target),
        ([sys.executable, "-m", "dvc", *steps[4][1:]], target),
    ):
        if code := subprocess.run(command, cwd=where, env=env).returncode:
            raise UserError(f"{shlex.join(command)}: exit code {code} in {target}")
    made = json.loads((target / "reports/model.json").read_text())
    results = json.loads((target / "reports/evaluation.json").read_text())
    same = made.get("weights_sha256") == known["weights_sha256"]
    before, after = (of["sampled"] for of in (known["evaluation"], results))
    print(
        f"weights: {'the same, bit by bit' if same else 'others (as another machine or thread count makes)'}\n"
        f"sampled clear rate {after['clear_rate']:.0%}, it was {before['clear_rate']:.0%}; "
        f"return {after['return_mean']:.0f}, it was {before['return_mean']:.0f}\nall of it is in {target}"
    )
    return 0


def _uncommitted(known: dict[str, Any]) -> list[str]:
    """Changed files whose content is not recorded: params.yaml is, as parameters."""
    if not known["trained"]["dirty"]:
        return []
    changed = [path for path in known["code"]["changed"] if path != str(PARAMS)]
    return changed or ([] if known["code"]["changed"] else ["files that are not known any more"])


def at_commit(commit: str) -> dict[str, Any]:
    """params.yaml of a commit.

    Raises:
        UserError: this repository has no such commit
    """
    done = subprocess.run(["git", "show", f"{commit}:{PARAMS}"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"commit {commit} is not in this repository; fetch it (git fetch --all)")
    return yaml.safe_load(done.stdout)


def overrides(recorded: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """What `dvc exp run -S` must set so that a committed params.yaml gives the recorded parameters."""
    profile = recorded["profile"]
    changes = [] if committed.get("profile") == profile else [f"profile={profile}"]
    over = (committed.get("profiles") or {}).get(profile) or {}
    effective = dict(_flat(committed)) | dict(_flat(over))
    for key, value in _flat({name: value for name, value in recorded.items() if name != "profile"}):
        if key not in effective or effective[key] != value:
            group = key.partition(".")[0]
            place = f"profiles.{profile}.{key}" if key in dict(_flat(over)) else key
            text = json.dumps(value) if not isinstance(value, str) else value
            if group in committed:  # a group that a later version added has no say here
                changes.append(f"{place}={text}")
    return changes


def _flat(values: dict[str, Any], prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines(values: dict[str, Any]) -> list[str]:
    found = []
    for key, value in _flat(values):
        shown = "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else value
        found.append(f"  {key:<40} {shown}")
    return found
