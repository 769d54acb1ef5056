"""Stages in real containers of the real image: `MARIO_RUNNER=docker`. Where there is no engine, these tests say so."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from clones import ROOT, copy, edit, environment, repository, run

from pipeline import engine, graph

STAGES = tuple(graph.load(ROOT / "dvc.yaml"))
SAME = (
    "data/seed",
    "data/replay",
    "reports/evaluation.json",
    "reports/episodes.csv",
    "reports/gifs",
)  # no ids, no times
DOCKER = {"MARIO_RUNNER": "docker"}


@pytest.fixture
def tree(tmp_path, image):
    return copy(tmp_path / "tree")


def script(tree: Path, body: str, stage: str = "report") -> None:
    """Puts a stage in the place of ours that needs no torch, so starts at once."""
    (tree / "stages" / f"{stage}.py").write_text(body)


def launch(tree: Path, stage: str = "report", env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.launch", stage]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=tree, env=environment(DOCKER | (env or {})), text=True, **pipes)


def wait_for(path: Path, process: subprocess.Popen[str] | None = None) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail(f"{path} did not appear")


def containers(tree: Path) -> list[str]:
    command = ["docker", "ps", "-aq", "--filter", f"label={engine.REPOSITORY_LABEL}={tree}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def assert_one_line(process: subprocess.Popen[str], code: int, *parts: str) -> None:
    err = process.communicate(timeout=300)[1]
    assert process.returncode == code, err
    assert re.fullmatch(r"error: .+\n", err), err
    assert all(part in err for part in parts), err


SAVES = """
import pathlib, signal, sys, time
def bye(signum, frame):
    pathlib.Path("saved").write_text(signal.Signals(signum).name)
    sys.exit(128 + signum)
def main():
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, bye)
    pathlib.Path("started").touch()
    time.sleep(600)
"""
STUBBORN = SAVES.replace("sys.exit(128 + signum)", "pass")


def test_the_pipeline_in_containers_gives_the_same_bytes_and_is_up_to_date_for_processes(tmp_path, image):
    there, here = repository(tmp_path / "docker"), tmp_path / "process"
    shutil.copytree(there, here)
    for tree, env in ((there, DOCKER), (here, {})):
        done = run(tree, "dvc", "--wait-for-lock", "repro", env=env, timeout=800)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.findall(r"Running stage '(\w+)'", done.stdout) == list(STAGES)
    assert "up to date" in run(there, "dvc", "repro").stdout
    assert outs(there) == outs(here)
    assert {path.stat().st_uid for path in there.rglob("*")} == {os.getuid()}
    assert containers(there) == []
    provenance = json.loads((there / "checkpoints/provenance.json").read_text())
    head = run(there, "git", "rev-parse", "HEAD").stdout.strip()
    assert head in json.dumps(provenance)
    assert tags(there)["image"] == {f"mario-dreamer@{image}"}
    assert tags(there)["git.commit"] == {head}
    assert "image" not in tags(here)


def outs(tree: Path) -> dict[str, str]:
    locked = yaml.safe_load((tree / "dvc.lock").read_text())["stages"].values()
    return {out["path"]: out["md5"] for stage in locked for out in stage["outs"] if out["path"] in SAME}


def tags(tree: Path) -> dict[str, set[str]]:
    import sqlite3

    found: dict[str, set[str]] = {}
    for key, value in sqlite3.connect(tree / "mlflow.db").execute("select key, value from tags"):
        found.setdefault(key, set()).add(value)
    return found


def test_output_comes_live_and_the_exit_code_is_the_stage_s(tree):
    body = (
        "import os, pathlib, sys, time\n"
        "def main():\n"
        "    print('half\\r', end='', file=sys.stderr, flush=True)\n"
        "    while not pathlib.Path('seen').exists():\n"
        "        time.sleep(0.05)\n"
        "    print(os.environ['MARIO_PIPELINE_KEY'], os.getcwd(), os.getuid(), os.getgid())\n"
        "    sys.exit(7)\n"
    )
    script(tree, body)
    process = launch(tree, env={"MARIO_PIPELINE_KEY": "mine"})
    assert process.stderr.read(4) == "half"
    (tree / "seen").touch()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 7
    assert out.split() == ["mine", str(tree), str(os.getuid()), str(os.getgid())]
    assert containers(tree) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_stage_which_saves(tree, signum):
    script(tree, SAVES)
    process = launch(tree)
    wait_for(tree / "started", process)
    process.send_signal(signum)
    process.communicate(timeout=300)
    assert process.returncode == 128 + signum
    assert (tree / "saved").read_text() == signum.name
    assert containers(tree) == []


def test_a_stage_that_does_not_stop_is_killed_after_runner_stop_seconds(tree):
    edit(tree, "stop_seconds: 8 ", "stop_seconds: 0.5 ")
    script(tree, STUBBORN)
    process = launch(tree)
    wait_for(tree / "started", process)
    process.terminate()
    process.communicate(timeout=300)
    assert (tree / "saved").exists()
    assert process.returncode == 128 + signal.SIGKILL
    assert containers(tree) == []


def test_a_container_whose_launcher_was_killed_is_ended_at_the_next_start(tree):
    script(tree, SAVES)
    process = launch(tree)
    wait_for(tree / "started", process)
    process.kill()
    process.wait()
    assert len(containers(tree)) == 1
    assert not (tree / "saved").exists()
    script(tree, "def main():\n    print('next')\n", "collect")
    done = run(tree, "python", "-m", "pipeline.launch", "collect", env=DOCKER)
    assert (done.returncode, done.stdout) == (0, "next\n")
    assert "ended the container of report" in done.stderr
    assert (tree / "saved").read_text() == "SIGTERM"
    assert containers(tree) == []


def test_a_container_at_work_is_left_alone(tree):
    script(tree, SAVES)
    process = launch(tree)
    wait_for(tree / "started", process)
    script(tree, "def main():\n    pass\n", "collect")
    assert run(tree, "python", "-m", "pipeline.launch", "collect", env=DOCKER).returncode == 0
    assert process.poll() is None
    assert len(containers(tree)) == 1
    process.terminate()
    process.communicate(timeout=300)


def test_a_stage_whose_dvc_is_killed_saves_and_ends(tree):
    script(tree, SAVES, "collect")
    assert run(tree, "git", "init", "-q", ".").returncode == 0
    dvc = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "collect"], cwd=tree, env=environment(DOCKER))
    wait_for(tree / "started")
    dvc.kill()
    dvc.wait()
    wait_for(tree / "saved")
    for _ in range(300):
        if not containers(tree):
            return
        time.sleep(0.1)
    pytest.fail("the container is still there")


def test_a_kill_for_want_of_memory_is_called_that(tree):
    edit(tree, "  memory: 0 ", "  memory: 64m ")
    script(tree, "def main():\n    print(len(bytearray(400_000_000)))\n")
    assert_one_line(launch(tree), 1, "report: killed for want of memory", "64m", "runner.memory")


def test_limits_are_the_container_s(tree):
    edit(tree, "  shared_memory: 1g", "  shared_memory: 32m")
    script(tree, "import os\ndef main():\n    s = os.statvfs('/dev/shm')\n    print(s.f_blocks * s.f_frsize)\n")
    assert run(tree, "python", "-m", "pipeline.launch", "report", env=DOCKER).stdout == f"{32 * 2**20}\n"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")
def test_a_gpu_that_is_asked_for_and_not_there_is_told(tree):
    edit(tree, "  gpus: auto ", "  gpus: all ")
    assert_one_line(launch(tree, "train"), 1, "NVIDIA", "runner.gpus: none")
    script(tree, "def main():\n    pass\n")
    assert run(tree, "python", "-m", "pipeline.launch", "report", env=DOCKER).returncode == 0  # has no use for one


def test_an_image_that_is_not_there_is_told(tree):
    assert_one_line(
        launch(tree, env={"MARIO_IMAGE": "mario-nowhere"}), 1, "no image mario-nowhere", "mario image build"
    )


def test_an_image_of_other_packages_is_told(tree):
    with (tree / "docker/stages.lock").open("a") as file:
        file.write("# newer\n")
    assert_one_line(launch(tree), 1, "docker/stages.lock", "mario image build")


def test_the_image_is_not_root_s_has_no_dvc_and_says_what_it_is(image):
    config = json.loads(
        subprocess.run(["docker", "image", "inspect", image], check=True, capture_output=True, text=True).stdout
    )[0]["Config"]
    assert config["User"] not in ("", "0", "root")
    assert config["Labels"][engine.LOCK_LABEL] == engine.lock_hash(ROOT / "docker/stages.lock")
    assert config["Labels"]["org.opencontainers.image.revision"]
    look = "import importlib.util as i, shutil; print(i.find_spec('dvc'), i.find_spec('prefect'), shutil.which('git'))"
    command = ["docker", "run", "--rm", "--init", image, "python", "-c", look]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "None None None\n"


# What needs no engine


def test_no_engine_is_told_and_may_be_tried_again(tmp_path):
    tree = copy(tmp_path / "tree")
    assert_one_line(launch(tree, env={"DOCKER_HOST": f"unix://{tmp_path}/nowhere"}), 75, "no engine answers", "start")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not use the engine")
def test_no_permission_is_told(engine_runs):
    code = (
        "import os, sys, docker, docker.context, requests\n"
        "from pipeline import engine, errors\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "os.environ['DOCKER_HOST'] = 'unix:///var/run/docker.sock'\n"
        "try:\n"
        "    with engine.connect() as client: client.ping()\n"
        "except errors.UserError as error: print(type(error).__name__, error)\n"
    )
    done = run(ROOT, "python", "-c", code)
    assert re.match(r"UserError docker: no permission .*usermod", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("  memory: 0 ", "  memory: lots ", ("runner.memory", "8g", "'lots'")),
        ("  gpus: auto ", "  gpus: -1 ", ("runner.gpus", "-1")),
        ("  minutes: 0 ", "  hours: 0 ", ("runner", "minutes")),
    ],
)
def test_what_is_wrong_in_the_runner_s_settings_is_one_line(tmp_path, old, new, parts):
    tree = copy(tmp_path / "tree")
    edit(tree, old, new)
    assert_one_line(launch(tree), 1, "params.yaml", *parts)


def test_a_full_disk_is_told():
    said = "failed to create task: write /var/lib/docker/x: no space left on device: unknown"
    assert "the disk is full" in engine.explained(said)
