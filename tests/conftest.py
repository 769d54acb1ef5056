"""What several tests share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is loaded: threads that wait for each other must not spin while something else wants the core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

ROOT = Path(__file__).parents[1]
LOCAL_BASE = "localhost/python:3.13-slim"  # where no registry is in reach, .ci/run makes this one


@pytest.fixture(scope="session")
def engine_runs() -> None:
    """Skips where no Docker engine answers."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker engine runs here")


@pytest.fixture(scope="session")
def image(engine_runs) -> str:
    """The digest of the image of the stages."""
    return build()


@pytest.fixture(scope="session")
def services_image(engine_runs) -> str:
    """The digest of the image of the services."""
    return build("--services")


def build(*arguments: str) -> str:
    has_local = subprocess.run(["docker", "image", "inspect", LOCAL_BASE], capture_output=True).returncode == 0
    env = ({"BASE_IMAGE": LOCAL_BASE} if has_local else {}) | os.environ
    command = [sys.executable, "-m", "pipeline.cli", "image", "build", *arguments]
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return built.stdout.split()[-1]
