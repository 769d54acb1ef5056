"""What a result came from: code, data, game, machine and versions."""

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "gymnasium", "gym-super-mario-bros", "nes-py", "dvc", "mlflow", "prefect")


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def surroundings() -> dict[str, str | None]:
    """What ran this process, as far as it was told: image (digest), flow_run of Prefect, experiment of DVC."""
    names = {"image": "MARIO_IMAGE_DIGEST", "flow_run": "MARIO_FLOW_RUN_ID", "experiment": "DVC_EXP_NAME"}
    return {key: os.environ.get(name) or None for key, name in names.items()}


def hardware() -> dict[str, Any]:
    """cpu, cores this process may use, gpu or None, memory in GB."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that shape results, where installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
