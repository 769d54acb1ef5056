"""The agent that ships with the repository, in pretrained/, becomes champion where there is none yet."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.errors import UserError
from pipeline.registry import CHALLENGER, DATABASE, MODEL, Registry

BUNDLE = Path("pretrained")
KIND = "shipped"


def enroll() -> str | None:
    """Registers it and makes it champion. Without a registry in reach, or with a champion, nothing happens.

    Returns:
        its version, if it is champion now
    """
    if not (BUNDLE / "config.json").exists():
        return None
    try:
        begun = DATABASE.exists() or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
        registry = Registry() if begun else None
    except UserError as error:
        print(f"the agent in {BUNDLE}/ is not registered: {error}")
        return None
    terms, before = (registry.terms(), registry.aliases()) if registry else ([], {})
    if registry and registry.champion(terms) is not None:
        return None
    with tempfile.TemporaryDirectory(prefix="mario-shipped-") as folder:
        out = Path(folder) / "model.json"
        done = subprocess.run([sys.executable, "-m", "stages", "enroll", str(BUNDLE), "--out", str(out)])
        if done.returncode or not (model := json.loads(out.read_text())):  # it has told why
            return None
    registry = registry or Registry()
    # Who registers is challenger; this one is not, and whoever was stays it.
    if CHALLENGER in before:
        registry.client.set_registered_model_alias(MODEL, CHALLENGER, before[CHALLENGER])
    else:
        registry.client.delete_registered_model_alias(MODEL, CHALLENGER)
    result = json.loads((BUNDLE / "config.json").read_text())["lineage"]["evaluation"]["sampled"]
    reason = f"ships with the repository: clears {result['clear_rate']:.1%} of {result['episodes']} held-out episodes"
    term = registry.appoint(registry.version(model["version"]), terms[-1].number if terms else 0, KIND, reason, "")
    if term is None:
        return None
    print(f"version {term.version} is champion: {reason}")
    return term.version
