"""What several tests share."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from clones import free_port

# A shell's background job ignores Ctrl-C, and so would every process that a test starts in order to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is loaded: threads that wait for each other must not spin while something else wants the core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

ROOT = Path(__file__).parents[1]
LOCAL_BASE = "localhost/python:3.13-slim"  # where no registry is in reach, .ci/run makes this one


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Torch has as many after a test as before it."""
    torch = sys.modules.get("torch")  # most tests have no use for it
    before = torch and torch.get_num_threads()
    yield
    if torch:
        torch.set_num_threads(before)


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


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory) -> Iterator[dict[str, str]]:
    """A Prefect server of its own; the environment by which commands find it."""
    port = free_port()
    home = tmp_path_factory.mktemp("prefect")
    url = f"http://127.0.0.1:{port}/api"
    env = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "true"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(1200):
            with suppress(OSError), urllib.request.urlopen(f"{url}/health") as answer:
                if answer.status == 200:
                    break
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.2)
        yield env | {"PREFECT_API_URL": url}
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A directory with two small agents, one.pt and two.pt."""
    from live import save_agents  # late: most tests have no use for torch

    return save_agents(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def served(checkpoints) -> Iterator:
    """A live session of one.pt, served in this process."""
    from live import Served, open_session

    with open_session(checkpoints, time_limit=2000) as session:
        served = Served(session)
        yield served
        served.stop()
