"""docker/compose.yaml with the real image: MLflow, Prefect and a worker come up, run the pipeline and lose nothing."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import requests
from clones import free_port, run
from test_flow import ask, toy


class Services:
    def __init__(self, tree: Path):
        self.tree, self.project = tree, f"mario-test-{os.getpid()}"
        self.mlflow, self.prefect, self.worker = free_port(), free_port(), free_port()
        self.env = {
            "COMPOSE_PROJECT_NAME": self.project,
            "PWD": str(tree),
            "MARIO_USER": f"{os.getuid()}:{os.getgid()}",
            "MARIO_MLFLOW_PORT": str(self.mlflow),
            "MARIO_PREFECT_PORT": str(self.prefect),
            "MARIO_WORKER_PORT": str(self.worker),
        }

    def compose(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = ["docker", "compose", "-f", "docker/compose.yaml", *arguments]
        return run(self.tree, *command, env=self.env | (env or {}), timeout=800)

    def up(self) -> None:
        done = self.compose("up", "--wait")
        assert done.returncode == 0, done.stderr + self.compose("logs", "--tail", "60").stdout

    def ask(self, what: str, **body):
        return ask(f"http://127.0.0.1:{self.prefect}/api/{what}", body)


@pytest.fixture
def services(tmp_path, services_image):
    found = Services(toy(tmp_path / "tree", {"first": [], "last": ["first"]}))
    yield found
    found.compose("down", "--volumes", "--timeout", "5")


def test_services_run_the_pipeline_and_lose_nothing(services):
    services.up()
    ports = services.compose("ps", "--format", "json").stdout
    assert "0.0.0.0" not in ports and "127.0.0.1" in ports
    mlflow = f"http://127.0.0.1:{services.mlflow}/api/2.0/mlflow/experiments"
    assert requests.post(f"{mlflow}/create", json={"name": "kept"}, timeout=60).ok
    deployment = next(one for one in services.ask("deployments/filter") if one["name"] == "on-demand")
    flow_run = services.ask(f"deployments/{deployment['id']}/create_flow_run")["id"]
    assert finished(services, flow_run)["name"] == "Completed", services.compose("logs", "worker").stdout
    assert (services.tree / "last.out").stat().st_uid == os.getuid()
    assert "up to date" in run(services.tree, "dvc", "status").stdout  # for the host's DVC, too
    assert services.compose("down").returncode == 0

    services.up()
    kept = requests.get(f"{mlflow}/get-by-name?experiment_name=kept", timeout=60)
    assert kept.ok, kept.text
    assert finished(services, flow_run)["name"] == "Completed"
    assert sum(one["name"] == "on-demand" for one in services.ask("deployments/filter")) == 1


def finished(services: Services, flow_run: str) -> dict:
    for _ in range(600):
        state = services.ask("flow_runs/filter", flow_runs={"id": {"any_": [flow_run]}})[0]["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return state
        time.sleep(0.5)
    return state


def test_a_host_name_that_mlflow_refuses_shows_as_unhealthy(services):
    assert services.compose("up", "-d", "mlflow", env={"MARIO_MLFLOW_HOSTS": "elsewhere"}).returncode == 0
    container = services.compose("ps", "-q", "mlflow").stdout.strip()
    for _ in range(600):
        asked = run(services.tree, "docker", "inspect", "-f", "{{json .State.Health}}", container)
        if "403" in asked.stdout:
            assert json.loads(asked.stdout)["Status"] != "healthy"
            return
        time.sleep(0.5)
    pytest.fail(asked.stdout)


def test_without_a_user_the_remedy_is_told(services):
    services.env.pop("MARIO_USER")
    done = services.compose("config", "-q")
    assert done.returncode != 0
    assert "MARIO_USER" in done.stderr and "id -u" in done.stderr


def test_the_gpu_s_file_fits(services):
    services.env["COMPOSE_FILE"] = "docker/compose.yaml:docker/compose.gpu.yaml"
    done = run(services.tree, "docker", "compose", "config", env=services.env)
    assert done.returncode == 0, done.stderr
    assert "nvidia" in done.stdout
