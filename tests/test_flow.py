"""The Prefect flow with a real server, DVC and engine, on a small pipeline whose stages take no time of their own."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import requests
import yaml
from clones import ROOT, commit, environment, run
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from pipeline import engine, repro, settings, workspace
from pipeline.errors import TryAgain, UserError
from pipeline.session import Session
from pipeline.watch import OUT_OF_TIME, Watch

GRAPH = {  # each stage with what it needs
    "first": [],
    "left": ["first"],
    "right": ["first"],
    "gpu1": ["left"],
    "gpu2": ["right"],
    "last": ["gpu1", "gpu2"],
}
MAIN = """
import json, pathlib, sys
name = sys.argv[1]
if name == "play":
    if "champion" in sys.argv:
        sys.exit("error: no model champion; train one")
    rows = [{"seed": 7, "outcome": "flag", "return": 1.0, "best_x": 9, "decisions": 3}]
    about = {"checkpoint": "x.pt", "clear_rate": 1.0, "clear_rate_low": 0.2, "clear_rate_high": 1.0, "return_mean": 1.0}
    print(json.dumps(about | {"episodes": rows}))
    sys.exit()
exec(pathlib.Path(f"scripts/{name}.py").read_text())
pathlib.Path(f"{name}.out").write_text(name + pathlib.Path(f"scripts/{name}.py").read_text())
"""
MEET = """
import pathlib, time
pathlib.Path(".mario/{here}").touch()
end = time.monotonic() + 120
while not pathlib.Path(".mario/{there}").exists():
    assert time.monotonic() < end, "{there} does not run beside {here}"
    time.sleep(0.05)
"""
ALONE = """
import pathlib, time
busy = pathlib.Path(".mario/busy")
busy.touch(exist_ok=False)
time.sleep(1)
busy.unlink()
"""
SAVES = """
import pathlib, signal, subprocess, sys, time
def bye(signum, frame):
    pathlib.Path(".mario/saved").open("a").write(signal.Signals(signum).name)
    sys.exit(128 + signum)
for one in (signal.SIGINT, signal.SIGTERM):
    signal.signal(one, bye)
child = subprocess.Popen(["sleep", "600"])
pathlib.Path(".mario/started").write_text(str(child.pid))
time.sleep(600)
"""

WAITS = """
import pathlib, time
pathlib.Path(".mario/started").write_text("1")
while not pathlib.Path(".mario/go").exists():
    time.sleep(0.1)
"""


def toy(tree: Path, stages: dict[str, list[str]]) -> Path:
    """A repository with the real pipeline/ and stages that do what scripts/NAME.py says."""
    shutil.copytree(ROOT / "pipeline", tree / "pipeline")
    for name in ("stages", "scripts", "docker", ".mario"):
        (tree / name).mkdir()
    (tree / "stages/__init__.py").touch()
    (tree / "stages/__main__.py").write_text(MAIN)
    for name in ("stages.lock", "compose.yaml", "compose.gpu.yaml"):
        shutil.copy(ROOT / "docker" / name, tree / "docker")
    shutil.copy(ROOT / "prefect.yaml", tree)
    (tree / ".gitignore").write_text("/.mario/\n*.out\n__pycache__/\n")
    runner = yaml.safe_load((ROOT / "params.yaml").read_text())["runner"]
    (tree / "params.yaml").write_text(
        yaml.safe_dump({"profile": "a", "value": 1, "runner": runner, "profiles": {"a": {}}})
    )
    dvc = {}
    for name, needs in stages.items():
        (tree / f"scripts/{name}.py").write_text("")
        dvc[name] = {
            "cmd": f'exec env PATH="$PWD/.venv/bin:$PATH" python -m pipeline.launch {name}',
            "deps": [f"scripts/{name}.py", *(f"{need}.out" for need in needs)],
            "outs": [f"{name}.out"],
        } | ({"meta": {"gpu": True}} if name.startswith("gpu") else {})
    dvc[next(iter(stages))]["params"] = ["value"]
    (tree / "dvc.yaml").write_text(yaml.safe_dump({"stages": dvc}, sort_keys=False))
    assert run(tree, "bash", "-c", "git init -q . && dvc init -q").returncode == 0
    commit(tree)
    return tree


def ask(url: str, body: dict):
    """Of Prefect's API, as its own client asks it: again after a 503, by which it means a locked database."""
    again = Retry(total=8, backoff_factor=0.5, status_forcelist=[503], allowed_methods=None)
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=again))
        answer = session.post(url, json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()


class Server:
    def __init__(self, env: dict[str, str]):
        self.env, self.url = env, env["PREFECT_API_URL"]

    def ask(self, what: str, **body):
        return ask(f"{self.url}/{what}", body)

    def state(self, flow_run: str) -> tuple[str, str, str]:
        state = requests.get(f"{self.url}/flow_runs/{flow_run}", timeout=60).json()["state"]
        return state["type"], state["name"], state["message"] or ""

    def tasks(self, flow_run: str) -> dict[str, tuple[str, str, int]]:
        rows = self.ask("task_runs/filter", flow_runs={"id": {"any_": [flow_run]}})
        return {
            row["name"].partition("-")[0]: (row["state"]["name"], row["state"]["message"] or "", row["run_count"])
            for row in rows
        }

    def artifacts(self, flow_run: str) -> dict[str, str]:
        rows = self.ask("artifacts/filter", artifacts={"flow_run_id": {"any_": [flow_run]}})
        return {row["key"]: row["data"] for row in rows}

    def cancel(self, flow_run: str) -> None:
        self.ask(f"flow_runs/{flow_run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})


@pytest.fixture(scope="module")
def server(prefect_server):
    return Server(prefect_server)


def mario(tree: Path, server: Server, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.cli", "run", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=tree, env=environment(server.env | (env or {})), **streams)


def latest(server: Server) -> str:
    return server.ask("flow_runs/filter", sort="START_TIME_DESC", limit=1)[0]["id"]


def go(tree: Path, server: Server, *arguments: str, code: int = 0, env: dict[str, str] | None = None) -> str:
    """`mario run` to its end. Returns the flow run's id."""
    process = mario(tree, server, *arguments, env=env)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == code, output
    return latest(server)


def names(server: Server, flow_run: str) -> dict[str, str]:
    return {task: state for task, (state, _, _) in server.tasks(flow_run).items()}


def wait_for(path: Path) -> str:
    for _ in range(2400):
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.1)
    return pytest.fail(f"{path} did not appear")


def gone(pid: int) -> bool:
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return True
        time.sleep(0.1)
    return False


def containers(tree: Path) -> list[str]:
    command = ["docker", "ps", "-aq", "--filter", f"label={engine.REPOSITORY_LABEL}={tree}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_every_state_that_a_stage_can_end_in(tmp_path, server):
    """One story: all run, side by side but for the GPU; nothing changed; one fails; one is restored."""
    tree = toy(tmp_path / "tree", GRAPH)
    scripts = tree / "scripts"
    for here, there in (("left", "right"), ("right", "left")):
        (scripts / f"{here}.py").write_text(MEET.format(here=here, there=there))
    for name in ("gpu1", "gpu2"):
        (scripts / f"{name}.py").write_text(ALONE)
    flow_run = go(tree, server)
    assert names(server, flow_run) == dict.fromkeys(GRAPH, "Ran")
    assert server.state(flow_run) == ("COMPLETED", "Completed", "6 ran")
    assert json.loads(server.artifacts(flow_run)["stages"])[0] == {
        "stage": "first",
        "state": "Ran",
        "why": "it had not run here yet",
    }
    assert "mario-" in run(tree, "dvc", "exp", "list").stdout

    flow_run = go(tree, server)
    assert names(server, flow_run) == dict.fromkeys(GRAPH, "Cached")

    before = (scripts / "right.py").read_text()
    (scripts / "right.py").write_text("raise SystemExit('error: out of luck; roll again')")
    (scripts / "left.py").write_text("0")
    flow_run = go(tree, server, code=1)
    told = server.tasks(flow_run)
    assert told["right"] == ("Failed", "out of luck; roll again", 1)  # and was not tried again
    assert {name: told[name][0] for name in ("first", "left", "last")} == {
        "first": "Cached",
        "left": "Ran",
        "last": "NotReady",
    }
    assert "changed: scripts/left.py" in told["left"][1]
    assert server.state(flow_run)[::2] == ("FAILED", "right: out of luck; roll again")

    (scripts / "right.py").write_text(before)
    states = names(server, go(tree, server))
    assert (states["left"], states["right"]) == ("Cached", "Restored")  # DVC had removed its outs before it failed


def test_the_gate_is_the_last_step_where_params_say_so(tmp_path, server):
    """Only after a model was evaluated anew; here the store is empty, and that is what the gate tells."""
    tree = toy(tmp_path / "tree", {"evaluate": []})
    assert names(server, go(tree, server)) == {"evaluate": "Ran"}
    params = tree / "params.yaml"
    params.write_text(params.read_text() + "\npromote: {automatic: true}\n")
    assert names(server, go(tree, server)) == {"evaluate": "Cached"}
    (tree / "scripts/evaluate.py").write_text("1")
    flow_run = go(tree, server, code=1)
    told = server.tasks(flow_run)
    assert told["evaluate"][0] == "Ran"
    assert told["promote"][0] == "Failed" and "nothing is registered here yet" in told["promote"][1]


@pytest.mark.parametrize(
    ("lines", "code", "expected"),
    [
        (["challenger  version 4: clear rate 98%", "PASS: clears 98% against 40%", "version 4 is champion now"], 0,
         ("Promoted", "clears 98% against 40%")),
        (["FAIL: clear rate 0% is below the floor", "FAIL: clears 0% against 40%", "version 4 is not promoted"], 1,
         ("Refused", "clear rate 0% is below the floor; clears 0% against 40%")),
        (["error: version 4 is the champion already"], 1, "version 4 is the champion already"),
    ],
)  # fmt: skip
def test_what_the_gate_says_is_understood(lines, code, expected):
    if isinstance(expected, tuple):
        assert repro.judged(lines, code) == expected
    else:
        with pytest.raises(repro.StageFailed, match=expected):
            repro.judged(lines, code)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("promote: {automatic: false}", False),
        ("promote: {automatic: true}", True),
        ("value: 1", False),
        ("profile: p\nprofiles: {p: {promote: {automatic: true}}, q: {}}\npromote: {automatic: false}", True),
        ("profile: q\nprofiles: {p: {promote: {automatic: true}}, q: {}}\npromote: {automatic: false}", False),
    ],
)
def test_promotion_by_itself_is_a_parameter_of_the_profile(tmp_path, text, expected):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert settings.promotes(path) is expected


def test_parameters_of_one_run_leave_the_repository_as_it_was(tmp_path, server):
    tree = toy(tmp_path / "tree", {"first": []})
    (tree / "scripts/first.py").write_text("import sys\nsys.stdout.write(open('params.yaml').read())\n")
    go(tree, server)
    commit(tree)
    params = (tree / "params.yaml").read_text()
    process = mario(tree, server, "--set", "value=3")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert "value: 3" in output and "changed: value" in output
    assert (tree / "params.yaml").read_text() == params
    assert run(tree, "git", "status", "--porcelain").stdout == ""
    assert run(tree, "dvc", "status").stdout.startswith("Data and pipelines are up to date")
    tags = requests.get(f"{server.url}/flow_runs/{latest(server)}", timeout=60).json()["tags"]
    saved = run(tree, "dvc", "exp", "list", "--name-only").stdout.split()
    assert len(saved) == 1
    assert "runner:process" in tags


@pytest.mark.parametrize(("runner", "how"), [("process", "ctrl-c"), ("docker", "page")])
def test_a_run_that_is_stopped_saves_and_leaves_nothing_behind(tmp_path, server, runner, how, request):
    if runner == "docker":
        request.getfixturevalue("image")
    tree = toy(tmp_path / "tree", {"first": [], "last": ["first"]})
    (tree / "scripts/last.py").write_text(SAVES)
    process = mario(tree, server, "--runner", runner)
    child = int(wait_for(tree / ".mario/started"))
    flow_run = json.loads((tree / ".mario/flow.json").read_text())["flow_run_id"]
    if how == "ctrl-c":
        process.send_signal(signal.SIGINT)
    else:
        server.cancel(flow_run)
    output = process.communicate(timeout=300)[0]
    assert (tree / ".mario/saved").read_text() == "SIGINT", output
    assert process.returncode == 130, output
    assert server.state(flow_run)[0] == "CANCELLED"
    assert names(server, flow_run)["first"] == "Ran"
    assert containers(tree) == [] if runner == "docker" else gone(child)
    (tree / "scripts/last.py").write_text("")
    assert names(server, go(tree, server)) == {"first": "Cached", "last": "Ran"}  # nothing of it stays locked


def test_a_budget_ends_what_runs_and_it_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # a server that is away ends no run
    (tmp_path / ".mario").mkdir()
    session = Session([sys.executable, "-c", SAVES], environment(), lambda chunk: None)
    wait_for(tmp_path / ".mario/started")
    with Watch(uuid.uuid4(), stop_seconds=60, minutes=0.001) as watch, watch.over(session):
        assert session.wait() == 128 + signal.SIGINT
        assert watch.why == OUT_OF_TIME
    assert (tmp_path / ".mario/saved").read_text() == "SIGINT"


def test_a_run_out_of_time_has_not_failed(tmp_path, server):
    tree = toy(tmp_path / "tree", {"first": []})
    (tree / "scripts/first.py").write_text(SAVES)
    flow_run = go(tree, server, "--minutes", "0.01")
    assert server.state(flow_run)[:2] == ("COMPLETED", "OutOfTime")
    assert names(server, flow_run)["first"] == "Cancelled"


def test_a_run_that_is_killed_takes_its_stage_along_and_is_marked_by_the_next(tmp_path, server):
    tree = toy(tmp_path / "tree", {"first": []})
    (tree / "scripts/first.py").write_text(SAVES)
    process = mario(tree, server)
    wait_for(tree / ".mario/started")
    killed = json.loads((tree / ".mario/flow.json").read_text())["flow_run_id"]
    process.kill()
    process.wait()
    assert wait_for(tree / ".mario/saved") == "SIGTERM"
    (tree / "scripts/first.py").write_text("")
    assert names(server, go(tree, server)) == {"first": "Ran"}
    assert server.state(killed)[0] == "CRASHED"


def test_an_engine_that_is_gone_is_tried_again_until_it_is_back(tmp_path, server, image):
    tree = toy(tmp_path / "tree", {"first": []})
    socket = tmp_path / "docker.sock"
    process = mario(tree, server, "--runner", "docker", env={"DOCKER_HOST": f"unix://{socket}"})
    for line in process.stdout:
        if "no engine answers" in line:
            break
    socket.symlink_to("/var/run/docker.sock")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    state, _, tries = server.tasks(latest(server))["first"]
    assert (state, tries > 1) == ("Ran", True)


def test_two_runs_at_once_take_turns(tmp_path, server):
    tree = toy(tmp_path / "tree", {"first": []})
    (tree / "scripts/first.py").write_text(WAITS)
    one = mario(tree, server)
    wait_for(tree / ".mario/started")
    other = mario(tree, server)
    for line in other.stdout:
        if "waits for" in line:
            break
    (tree / ".mario/go").touch()
    assert (one.wait(300), other.wait(300)) == (0, 0)
    assert "first: Cached" in other.stdout.read()


@pytest.mark.parametrize(
    ("lines", "code", "expected"),
    [
        (["Running stage 'x':", "done"], 0, "Ran"),
        (["Stage 'x' didn't change, skipping"], 0, "Cached"),
        (["Stage 'x' is cached - skipping run, checking out outputs"], 0, "Restored"),
        (["error: no", "ERROR: failed to reproduce 'x': failed to run: y, exited with 1"], 1, repro.StageFailed("no")),
        (["error: gone", "ERROR: failed to run: y, exited with 75"], 1, TryAgain("gone")),
        (["ERROR: Unable to acquire lock. Most likely"], 1, TryAgain("Unable to acquire lock. Most likely")),
        (
            ["Traceback (most recent call last):", "ValueError: bad", "ERROR: exited with 1"],
            1,
            repro.StageFailed("ValueError: bad"),
        ),
    ],
)
def test_what_dvc_says_is_understood(lines, code, expected):
    if isinstance(expected, str):
        assert repro.outcome(lines, code) == expected
        return
    with pytest.raises(type(expected), match=f"^{re.escape(str(expected))}$") as caught:
        repro.outcome(lines, code)
    assert type(caught.value) is type(expected)


def test_overrides_go_where_they_hold(tmp_path):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    workspace.change(path, "debug", ["train.steps=20000", "seed=3", "runner.gpus=none"])
    values = yaml.safe_load(path.read_text())
    assert values["profile"] == "debug"
    assert values["profiles"]["debug"]["train"]["steps"] == 20_000
    assert (values["seed"], values["runner"]["gpus"]) == (3, "none")
    assert "# Every number of the pipeline." in path.read_text()
    with pytest.raises(UserError, match=r"unknown profile 'fast'; known: defaults"):
        workspace.change(path, "fast", [])
    with pytest.raises(UserError, match="NAME=VALUE"):
        workspace.change(path, None, ["train.steps"])


def test_what_a_killed_run_changed_is_put_back_by_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = tmp_path / "params.yaml"
    params.write_text("profile: a\nvalue: 1\nprofiles: {a: {}}\n")
    context = workspace.overridden(None, ["value=2"], lambda: None)
    context.__enter__()
    assert "value: 2" in params.read_text()
    workspace.put_back()  # as the next run begins
    assert params.read_text() == "profile: a\nvalue: 1\nprofiles: {a: {}}\n"
