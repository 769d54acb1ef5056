"""prefect.yaml's deployments on a real server with a real worker: a schedule that fires, overlaps, cancelling."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests
from clones import environment, run
from test_flow import SAVES, WAITS, Server, gone, toy, wait_for

from pipeline import deployments
from pipeline.errors import TryAgain

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Deployed:
    """A toy repository, deployed by `mario deploy` with `retrain` every minute, and a worker."""

    def __init__(self, tree, server: Server):
        self.tree, self.server = tree, server
        (tree / ".mario/go").touch()
        file = tree / "prefect.yaml"
        text = file.read_text()
        assert text.count('cron: "0 3 * * *"') == 1
        file.write_text(text.replace('cron: "0 3 * * *"', 'cron: "* * * * *"'))
        done = run(tree, "mario", "deploy", env=server.env)
        assert done.returncode == 0, done.stdout + done.stderr
        self.ids = {one["name"]: one["id"] for one in server.ask("deployments/filter")}
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "mario-process"]
        self.log = (tree / ".mario/worker.log").open("w")
        streams = {"stdout": self.log, "stderr": self.log, "start_new_session": True}
        self.worker = subprocess.Popen(command, cwd=tree, env=environment(server.env), **streams)

    def start(self, name: str, **parameters) -> str:
        return self.server.ask(f"deployments/{self.ids[name]}/create_flow_run", parameters=parameters)["id"]

    def runs(self, name: str) -> list[dict]:
        return self.server.ask("flow_runs/filter", deployments={"id": {"any_": [self.ids[name]]}})

    def end(self, flow_run: str) -> tuple[str, str, str]:
        for _ in range(3000):
            if (state := self.server.state(flow_run))[0] in FINAL:
                return state
            assert self.worker.poll() is None
            time.sleep(0.2)
        return pytest.fail(f"{state}: {(self.tree / '.mario/worker.log').read_text()}")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, prefect_server):
    found = Deployed(toy(tmp_path_factory.mktemp("deployed") / "tree", {"first": []}), Server(prefect_server))
    yield found
    os.killpg(found.worker.pid, signal.SIGINT)
    found.worker.wait(120)
    found.log.close()


def test_the_deployments_are_there_and_deploying_again_changes_nothing(deployed):
    assert set(deployed.ids) == {"retrain", "evaluate", "on-demand", "on-demand-docker"}
    pools = {one["name"]: one["type"] for one in deployed.server.ask("work_pools/filter")}
    assert pools == {"mario-process": "process", "mario-docker": "docker"}


def test_the_schedule_fires_and_next_time_there_is_nothing_to_do(deployed):
    for _ in range(3000):
        if ended := [one for one in deployed.runs("retrain") if one["state"]["type"] == "COMPLETED"]:
            break  # others, which came while it ran, are cancelled
        time.sleep(0.2)
    requests.post(f"{deployed.server.url}/deployments/{deployed.ids['retrain']}/pause_deployment", timeout=60)
    first = min(ended, key=lambda one: one["expected_start_time"])
    assert first["auto_scheduled"]
    assert (first["state"]["name"], first["state"]["message"]) == ("Completed", "1 ran")
    assert (deployed.tree / "first.out").exists()
    for one in deployed.runs("retrain"):
        if one["state"]["type"] != "SCHEDULED":
            deployed.end(one["id"])
    assert deployed.end(deployed.start("retrain"))[1] == "UpToDate"


def test_of_two_at_once_one_runs(deployed):
    (deployed.tree / ".mario/go").unlink()
    (deployed.tree / "scripts/first.py").write_text(WAITS)
    one = deployed.start("retrain")
    wait_for(deployed.tree / ".mario/started")
    other = deployed.start("retrain")
    assert deployed.end(other)[0] == "CANCELLED"
    (deployed.tree / ".mario/go").touch()
    assert deployed.end(one)[::2] == ("COMPLETED", "1 ran")


def test_a_retrain_beside_another_run_is_skipped(deployed):
    for name in ("go", "started"):
        (deployed.tree / f".mario/{name}").unlink()
    (deployed.tree / "scripts/first.py").write_text(WAITS + "0\n")
    one = deployed.start("on-demand", runner="process")
    wait_for(deployed.tree / ".mario/started")
    kind, name, message = deployed.end(deployed.start("retrain"))
    assert (kind, name) == ("COMPLETED", "Skipped")
    assert "another run is at work" in message
    (deployed.tree / ".mario/go").touch()
    assert deployed.end(one)[0] == "COMPLETED"


def test_cancelling_on_the_page_reaches_the_stage(deployed):
    (deployed.tree / ".mario/started").unlink()
    (deployed.tree / "scripts/first.py").write_text(SAVES)
    flow_run = deployed.start("on-demand")
    child = int(wait_for(deployed.tree / ".mario/started"))
    deployed.server.cancel(flow_run)
    assert gone(child)
    assert wait_for(deployed.tree / ".mario/saved") == "SIGINT"
    assert deployed.end(flow_run)[0] == "CANCELLED"


def test_evaluate_plays_what_it_is_told(deployed):
    flow_run = deployed.start("evaluate", model="challenger", episodes=1)
    assert deployed.end(flow_run)[::2] == ("COMPLETED", "challenger: clear rate 100% in 1 episodes")
    assert {"evaluation", "episodes"} <= set(deployed.server.artifacts(flow_run))
    assert deployed.end(deployed.start("evaluate"))[::2] == ("FAILED", "no model champion; train one")


def test_without_a_server_the_remedy_is_told(deployed):
    done = run(deployed.tree, "mario", "deploy", env={"PREFECT_HOME": str(deployed.tree / ".mario/none")})
    assert done.returncode == 1
    assert done.stderr.startswith("error: PREFECT_API_URL") and "prefect server start" in done.stderr
    done = run(deployed.tree, "mario", "deploy", env={"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert done.returncode == 75
    assert "no Prefect server answers" in done.stderr


@pytest.mark.parametrize("locked", [2, 9])
def test_a_server_with_a_locked_database_is_asked_again(monkeypatch, locked):
    """It says 503 then, and none can be made to at will: this one does so the first few times."""
    answers = []

    class Locked(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            answers.append(200 if len(answers) >= locked else 503)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answers[-1])
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
        monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *_: None)
        if locked == 2:
            assert deployments.api().endswith("/api") and answers == [503, 503, 200]
        else:
            with pytest.raises(TryAgain, match="too busy to answer"):
                deployments.api()
            assert answers == [503] * 5
        server.shutdown()


def test_doctor_says_what_there_is_and_what_to_do(deployed):
    done = run(deployed.tree, "mario", "doctor", env=deployed.server.env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line[6:18].strip(): line for line in done.stdout.splitlines()}
    assert {"Python", "disk", "runner", "compiler", "git", "GPU", "DVC remote", "MLflow", "Prefect"} <= set(lines)
    assert "dvc remote add" in lines["DVC remote"]
    away = {"CC": "no-such-compiler", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "DOCKER_HOST": "unix:///nowhere"}
    done = run(deployed.tree, "mario", "doctor", env=deployed.server.env | away)
    assert done.returncode == 1
    assert "BAD   MLflow" in done.stdout and "no engine answers" in done.stdout
    assert "note  compiler     no C compiler" in done.stdout
