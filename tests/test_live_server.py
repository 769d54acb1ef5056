"""The live page's server: who may drive it, how fast it goes, and what it says when something cannot be done."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agents import CPU
from clones import copy
from live import ROOT, say, until, views
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from dreamer import checkpoint
from dreamer.checkpoint import load_agent
from stages import bundle, params, paths, play, tracking
from stages.live import models, server
from stages.live.errors import LiveError


def test_the_game_waits_for_a_page_that_does_not_draw(served):
    with served.client() as client:
        first, second = views(client, 2)
        assert second["decisions"] == first["decisions"] + 1
        with pytest.raises(TimeoutError):
            views(client, 2, timeout=2)
        stopped_at = served.stage.session.episode.decisions
        assert stopped_at <= 3
        for k in range(2, 12):
            say(client, do="seen", value=k)
            (view,) = views(client, 1)
        assert stopped_at < view["decisions"] <= 13


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_other_sites_cannot_drive_it(served, origin):
    with pytest.raises(InvalidStatus, match="403"), served.client(origin):
        pass
    assert served.stage.session.episode.decisions == 0


def test_a_name_that_leads_to_loopback_is_refused(served):
    with socket.create_connection(served.socket.getsockname()) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: rebound.example\r\nConnection: close\r\n\r\n")
        assert b"400" in raw.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize(
    ("sent", "part"),
    [
        ('{"do": "fly"}', "fly"),
        ("nonsense", "not a command"),
        ("{not json", "not a command"),
        ('{"do": "speed", "value": 16}', "speed"),
        ('{"do": "hold", "value": ["Start"]}', "Start: no such button"),
        ('{"do": "pick", "value": "three.pt"}', "three.pt"),
        ('{"do": "begin", "seed": 1, "level": "1-9"}', "1-9"),
        ('{"do": "begin", "seed": -4, "level": "1-1"}', "seed -4"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_and_the_session_goes_on(served, sent, part):
    with served.client() as client:
        say(client, do="run", value=False)
        client.send(sent)
        error = until(client, "error")
        assert part in error
        assert "\n" not in error
        before = served.stage.session.episode.decisions
        say(client, do="seen", value=99)
        say(client, do="step")
        while views(client, 1)[0]["decisions"] != before + 1:
            pass
        assert served.stage.session.model == "one.pt"


def test_the_latest_page_has_the_stage_and_the_one_before_is_told(served):
    with served.client() as first:
        views(first, 1)
        with served.client() as second:
            views(second, 1)
            with pytest.raises(ConnectionClosed) as closed:
                views(first, 100)
            assert closed.value.rcvd.code == 4001
            say(second, do="run", value=False)
            say(second, do="step")
            while views(second, 1)[0]["running"]:
                pass


def test_a_port_that_is_taken_is_named():
    with server.bind(0) as taken, pytest.raises(LiveError, match=r"--port \d+: taken; name another one"):
        server.bind(taken.getsockname()[1])


def test_models_are_the_one_asked_for_and_the_checkpoints_and_looking_makes_no_registry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.pt").touch()
    assert asyncio.run(models.known("3")) == [
        {"name": "3", "about": "as started"},
        {"name": "checkpoints/best.pt", "about": "checkpoint"},
    ]
    assert not (tmp_path / "none.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense")
    told = asyncio.run(models.known("checkpoints/best.pt"))
    assert [each["name"] for each in told] == ["", "checkpoints/best.pt"]
    assert "MLFLOW_TRACKING_URI=nonsense" in told[0]["about"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory, checkpoints):
    root = copy(tmp_path_factory.mktemp("tree"))
    (root / "checkpoints").mkdir()
    (root / "checkpoints/best.pt").write_bytes((checkpoints / "one.pt").read_bytes())
    return root


def test_registered_models_are_listed_with_their_aliases_and_can_be_picked(tree, checkpoints, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setattr(paths, "ROOT", tree)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tree}/registry.db")
    settings = params.load(ROOT / "params.yaml")
    with tracking.run("evaluate", settings) as record:
        for name in ("one.pt", "two.pt"):
            made = bundle.write(tree / "bundle", checkpoint.load(checkpoints / name), settings.env.to_dict())
            record.log_model(made, settings, {})
    assert asyncio.run(models.known("2")) == [
        {"name": "2", "about": "version, challenger"},
        {"name": "1", "about": "version"},
        {"name": "checkpoints/best.pt", "about": "checkpoint"},
    ]
    agent = models.loader(play.find, CPU)("2")
    expected = load_agent(checkpoints / "two.pt", CPU)
    assert all(map(torch.equal, agent.parameters(), expected.parameters()))


def start(tree: Path, *arguments: str) -> subprocess.Popen:
    command = (sys.executable, "-m", "stages", "play", "--web", *arguments)
    return subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_says_where_it_is_and_ctrl_c_ends_it_with_a_page_open(tree):
    with start(tree, "--port", "0") as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"level 1-1: live on http://(127\.0\.0\.1:\d+)/ ", line)
            assert found, process.stderr.read()
            host = found[1]
            with connect(f"ws://{host}/session", origin=f"http://{host}") as client:
                views(client, 1)
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 130
                assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["--model", "nowhere/best.pt"], "no such checkpoint"), (["--level", "1-9"], "1-9")],
)
def test_what_is_wrong_at_the_start_is_one_line(tree, arguments, part):
    with start(tree, "--port", "0", *arguments) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    line = errors.splitlines()[0]
    assert line.startswith("error: ")
    assert part in line


@pytest.mark.parametrize("other", ["--json", "--save-gif"])
def test_what_the_page_has_no_use_for_is_a_usage_error(other, capsys):
    with pytest.raises(SystemExit):
        play.arguments(["--web", other])
    assert "--web shows its episodes in the browser" in capsys.readouterr().err
