"""Where a model comes from: all that is known when it is registered."""

import os
from pathlib import Path
from typing import Any

import yaml

from dreamer.mario import rom_sha256
from stages import digest, git, paths, provenance
from stages.params import Params
from stages.paths import BEST, CHECKPOINTS
from stages.record import Run

DVC_LOCK = Path("dvc.lock")


def collect(params: Params, trained: dict[str, Any], evaluation: dict[str, Any], run: Run) -> dict[str, Any]:
    """What goes into config.json of the bundle, and by `tags` to the registered version.

    Args:
        trained: checkpoints/provenance.json
        evaluation: reports/evaluation.json
        run: of the stage that registers
    """
    commit, dirty = git.state()
    return {
        "registered": provenance.now(),
        "code": {"commit": commit, "dirty": dirty, "changed": git.changes()},
        "trained": {key: value for key, value in trained.items() if key != "params"},
        "params": {**trained["params"], **{key: params.to_dict()[key] for key in ("evaluate", "render", "promote")}},
        "data": {
            "seed_data_sha256": trained["data_sha256"],
            "replay_md5": trained.get("replay_md5"),
            "checkpoints_md5": digest.dvc_md5(CHECKPOINTS),
            "checkpoint_sha256": digest.sha256(BEST),
            "rom_sha256": rom_sha256(),
        },
        "dvc": {**lock(), "stage": os.environ.get("DVC_STAGE")},
        "environment": {
            **provenance.surroundings(),
            "versions": provenance.versions(),
            "requirements_sha256": _sha256(paths.ROOT / "requirements.lock"),
        },
        "hardware": provenance.hardware(),
        "mlflow": {"run_id": run.run_id, "parent_run_id": run.parent_run_id, "tracking_uri": run.uri},
        "evaluation": evaluation,
    }


def lock() -> dict[str, Any]:
    """dvc.lock as it is now: its hash, and whether it names these checkpoints.

    DVC writes a stage's entry once the stage has ended, so the lock of a registration has those of collect and train,
    which made the model, and not yet that of evaluate, which registers it.
    """
    if (sha256 := _sha256(DVC_LOCK)) is None:
        return {"lock_sha256": None, "lock_names_checkpoints": False}
    stages = (yaml.safe_load(DVC_LOCK.read_text()) or {}).get("stages") or {}
    outs = {out["path"]: out["md5"] for out in stages.get("train", {}).get("outs", ())}
    named = outs.get(str(CHECKPOINTS)) == digest.dvc_md5(CHECKPOINTS)
    return {"lock_sha256": sha256, "lock_names_checkpoints": named}


def tags(lineage: dict[str, Any]) -> dict[str, str]:
    """What the registry can be searched for; names as on runs."""
    trained, data, machine = lineage["trained"], lineage["data"], lineage["hardware"]
    found = {
        **{key: data[key] for key in ("replay_md5", "checkpoints_md5", "checkpoint_sha256")},
        "dvc.lock_sha256": lineage["dvc"]["lock_sha256"],
        "dvc.lock_names_checkpoints": str(lineage["dvc"]["lock_names_checkpoints"]).lower(),
        "seed": trained["seed"],
        "trained.commit": trained["commit"],
        "trained.dirty": None if trained["dirty"] is None else str(trained["dirty"]).lower(),
        "trained.profile": trained["profile"],
        "trained.image": trained.get("image"),
        "trained.flow_run": trained.get("flow_run"),
        "trained.experiment": trained.get("experiment"),
        "trained_by": (trained["mlflow"] or {}).get("run_id"),
        "hardware": f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}",
        "requirements_sha256": lineage["environment"]["requirements_sha256"],
    }
    return {key: "unknown" if value is None else str(value) for key, value in found.items()}


def _sha256(path: Path) -> str | None:
    return digest.sha256(path) if path.exists() else None
