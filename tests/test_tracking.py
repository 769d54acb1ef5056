"""Tracking against a real SQLite store and a real MLflow server."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from clones import free_port

from stages import gif, git, outbox, params, paths, record, tracking
from stages.tracking import TrackingError

ROOT = Path(__file__).parents[1]
PARAMS = params.load(ROOT / "params.yaml")
mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A repository's root that tracking takes for its own; the working directory is elsewhere."""
    for key in ("MARIO_PIPELINE_KEY", "DVC_STAGE", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)
    root = tmp_path / "a root@home"
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(outbox, "SEND_EVERY", 0.1)
    return root


@pytest.fixture
def client(tree, database, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    return mlflow.MlflowClient(database)


class Server:
    """`mlflow server` that answers to localhost and refuses 127.0.0.1 as a name."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://localhost:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--allowed-hosts", "localhost:*"]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        env.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        for _ in range(3000):
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("mlflow server does not answer")

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()

    def send(self, signum: int) -> None:
        os.killpg(self.process.pid, signum)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def steps(client, run_id: str, name: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def test_stages_of_one_pipeline_share_a_parent_run(client, tree, monkeypatch):
    monkeypatch.setenv("MARIO_PIPELINE_KEY", "12-34.5")
    monkeypatch.setenv("DVC_EXP_NAME", "tall-mario")
    with tracking.run("collect", PARAMS) as collect:
        assert client.get_run(collect.parent_run_id).info.status == "RUNNING"
        collect.tags({"data_sha256": "d" * 64})
    monkeypatch.setenv("DVC_STAGE", "train")
    with tracking.run("train", PARAMS, {"data_sha256": "d" * 64}) as train:
        train.headline({"eval_return": 5.0}, 400)
    assert train.parent_run_id == collect.parent_run_id
    known = json.loads((tree / ".mario/pipeline_run.json").read_text())
    experiment = client.get_experiment_by_name("mario-dreamer").experiment_id
    named = {"experiment_id": experiment, "parent_run_id": train.parent_run_id, "tracking_uri": train.uri}
    assert known == {"key": "12-34.5", **named}

    parent, child = client.get_run(train.parent_run_id), client.get_run(train.run_id)
    assert client.get_experiment(child.info.experiment_id).name == "mario-dreamer"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "mlflow.parentRunId" not in parent.data.tags
    assert child.info.run_name == "train"
    assert parent.info.run_name.startswith("pipeline 2") and parent.info.run_name.endswith(" debug")
    assert {parent.info.status, child.info.status} == {"FINISHED"}
    for run in (parent, child):
        assert run.data.params["model.deter"] == str(PARAMS.model.deter)
        assert run.data.params["optimizers.model.lr"] == str(PARAMS.optimizers.model.lr)
        assert len(run.data.params) > 50
        tags = run.data.tags
        assert (tags["profile"], tags["level"], tags["dvc.exp"]) == ("debug", "1-1", "tall-mario")
        assert (tags["git.commit"], tags["git.dirty"]) == ("unknown", "unknown")
        assert (tags["data_sha256"], len(tags["rom_sha256"])) == ("d" * 64, 64)
        assert run.data.metrics["eval_return"] == 5.0
        assert steps(client, run.info.run_id, "eval_return") == [400]
    assert child.data.tags["dvc.stage"] == "train" and "dvc.stage" not in parent.data.tags

    monkeypatch.setenv("MARIO_PIPELINE_KEY", "another")
    with tracking.run("report", PARAMS) as report:
        pass
    assert report.parent_run_id != train.parent_run_id
    left = (tree / ".mario/pipeline_run.json").read_text()
    monkeypatch.delenv("MARIO_PIPELINE_KEY")
    with tracking.run("report", PARAMS) as by_hand:
        pass
    assert by_hand.parent_run_id not in (report.parent_run_id, train.parent_run_id)
    assert (tree / ".mario/pipeline_run.json").read_text() == left


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no"), "FAILED"),
        (SystemExit("error: no"), "FAILED"),
        (SystemExit(1), "FAILED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(128 + signal.SIGTERM), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_status_says_how_the_stage_ended(client, error, status):
    with pytest.raises(type(error)), tracking.run("train", PARAMS) as run:
        assert client.get_run(run.run_id).info.status == "RUNNING"
        raise error
    assert client.get_run(run.run_id).info.status == status
    assert client.get_run(run.parent_run_id).info.status == status


def test_metrics_are_complete_and_in_steps_of_frames(client):
    with tracking.run("train", PARAMS) as run:
        for step in range(0, 4000, 4):
            run.metrics({"model_loss": step / 2, "actor_loss": -step, "kl_divergence": math.nan}, step)
    expected = list(range(0, 4000, 4))
    assert sorted(steps(client, run.run_id, "model_loss")) == expected
    assert sorted(steps(client, run.run_id, "kl_divergence")) == expected
    losses = client.get_metric_history(run.run_id, "actor_loss")
    assert {metric.step: metric.value for metric in losses} == {step: -step for step in expected}
    assert client.get_run(run.run_id).data.metrics["system/cpu_utilization_percentage"] >= 0


def test_a_resumed_stage_goes_on_in_its_run_and_brings_its_parent(client, tree, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MARIO_PIPELINE_KEY", "yesterday")
    with pytest.raises(SystemExit), tracking.run("train", PARAMS) as first:
        for frames in (100, 200, 300):
            first.metrics({"model_loss": frames}, frames)
        raise SystemExit(143)
    monkeypatch.setenv("MARIO_PIPELINE_KEY", "today")
    changed = params.Params.from_dict(PARAMS.to_dict() | {"seed": 7})
    with tracking.run("train", changed, resume=first.run_id) as second:
        assert client.get_run(first.run_id).info.status == "RUNNING"
        second.metrics({"model_loss": 5}, 200)
    assert (second.run_id, second.parent_run_id) == (first.run_id, first.parent_run_id)
    with tracking.run("evaluate", changed) as evaluate:
        pass
    assert evaluate.parent_run_id == first.parent_run_id
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "0" and run.data.tags["params_changed"] == "seed: 0 -> 7"
    assert steps(client, first.run_id, "model_loss") == [100, 200, 300, 200]
    assert steps(client, first.run_id, "system/cpu_utilization_percentage") == [0, 1]

    (folder,) = (tree / ".mario/tensorboard/train").iterdir()
    assert len(list(folder.iterdir())) == 2
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("model_loss")] == [(100, 100), (200, 5)]


def test_a_lost_run_is_replaced_by_a_new_one(client, capfd):
    with tracking.run("train", PARAMS) as first:
        pass
    client.delete_run(first.run_id)
    for lost in (first.run_id, "0" * 32):
        with tracking.run("train", PARAMS, resume=lost) as second:
            pass
        assert second.run_id != lost
        (line,) = capfd.readouterr().err.splitlines()
        assert lost in line and "new one" in line


def test_videos_and_artifacts_reach_mlflow_and_tensorboard(client, tree, tmp_path, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "a.csv").write_text("1")
    (tmp_path / "b.json").write_text("{}")
    with tracking.run("train", PARAMS) as run:
        run.video("train_openl", iter(frames), 12000, fps=10)
        run.metrics({"eval_return": 7.0}, 12000)
        run.artifact(tmp_path / "losses", "training")
        run.artifact(tmp_path / "b.json", "evaluation")
        run.artifact(tmp_path / "missing", "evaluation")
    encoded = gif.encode(frames, 10)
    for path, content in {
        "videos/train_openl/000012000.gif": encoded,
        "training/a.csv": b"1",
        "evaluation/b.json": b"{}",
    }.items():
        assert Path(client.download_artifacts(run.run_id, path, str(tmp_path))).read_bytes() == content
    assert not list((tree / ".mario/outgoing").rglob("*.gif"))
    (folder,) = (tree / ".mario/tensorboard/train").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    (image,) = events.Images("train_openl")
    assert (image.step, image.width, image.height) == (12000, 48, 32)
    assert image.encoded_image_string == encoded
    assert [(event.step, event.value) for event in events.Scalars("eval_return")] == [(12000, 7.0)]
    (line,) = capfd.readouterr().err.splitlines()
    assert "missing: no such file" in line


def test_without_mlflow_and_tensorboard_stages_run_all_the_same(tree, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with tracking.run("train", PARAMS, resume="a" * 32) as run:
        run.metrics({"model_loss": 1.0}, 4)
        run.headline({"eval_return": 1.0}, 4)
        run.video("train_openl", np.zeros((2, 8, 8, 3), np.uint8), 4, fps=10)
        run.artifact(tree, "training")
        run.tags({"data_sha256": "d"})
        assert run.log_model(tree / "best.pt", PARAMS, {}) == {}
    assert (run.run_id, run.parent_run_id, run.uri) == (None, None, None)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "MLflow is not installed" in lines[0] and "TensorBoard is not installed" in lines[1]


def test_importing_it_is_cheap():
    code = "import sys, stages.tracking; print({'mlflow', 'torch', 'tensorboard'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_default_store_lies_in_the_repository_wherever_it_runs(tree):
    with tracking.run("report", PARAMS) as run:
        run.artifact(ROOT / "params.yaml", "report")
    assert run.uri == f"sqlite:///{tree}/mlflow.db"
    assert (tree / "mlartifacts" / run.run_id / "artifacts/report/params.yaml").exists()
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "uri", ["localhost:5000", "http//localhost", "http://", "file:///tmp/runs", "sqlite://", "mlruns", "sqlite:///"]
)
def test_a_malformed_address_is_told_in_one_line(tree, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError) as told, tracking.run("train", PARAMS):
        pass
    assert f"MLFLOW_TRACKING_URI={uri}:" in str(told.value) and "unset it" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_store_that_cannot_be_reached_is_told_at_once(tree, server, monkeypatch):
    port = free_port()
    for uri, remedy in {
        f"http://127.0.0.1:{port}": f"mlflow server --port {port}",
        f"http://127.0.0.1:{server.port}": f"--allowed-hosts naming 127.0.0.1:{server.port}",
        "sqlite:////proc/none/mlflow.db": "correct MLFLOW_TRACKING_URI",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(TrackingError) as told, tracking.run("train", PARAMS):
            pass
        assert str(told.value).startswith(f"{uri}: ") and remedy in str(told.value)
        assert "\n" not in str(told.value)


def test_a_server_that_goes_away_loses_nothing(tree, server, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE", 0.5)
    client = mlflow.MlflowClient(server.uri)
    with tracking.run("train", PARAMS) as run:
        run.metrics({"model_loss": 1.0, "kl_divergence": math.nan}, 4)
        while not steps(client, run.run_id, "model_loss"):
            time.sleep(0.1)
        server.kill()
        for step in range(8, 6008, 4):
            run.metrics({"model_loss": 1.0}, step)
        run.video("train_openl", np.zeros((2, 8, 8, 3), np.uint8), 6000, fps=10)
        time.sleep(1)
        server.start()
        while "is back" not in (told := capfd.readouterr().err):
            time.sleep(0.1)
    assert sorted(steps(client, run.run_id, "model_loss")) == list(range(4, 6008, 4))
    assert steps(client, run.run_id, "kl_divergence") == [4]
    assert client.list_artifacts(run.run_id, "videos/train_openl")[0].path.endswith("000006000.gif")
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert told.count("\n") <= 2


def test_what_a_checkpoint_kept_reaches_the_run_after_a_kill_and_only_once(client, monkeypatch):
    monkeypatch.setattr(outbox, "SEND_EVERY", 3600.0)
    with tracking.run("train", PARAMS) as run:
        run.metrics({"model_loss": 1.0}, 4)
        run.metrics({"model_loss": 2.0}, 8)
        kept = json.loads(json.dumps(run.waiting()))
        run._outbox._records = type(run._outbox._records)(list(run._outbox._records)[:1])  # a kill loses the rest
    assert steps(client, run.run_id, "model_loss") == [4]
    with tracking.run("train", PARAMS) as later:
        later.put_again([*kept, [run.run_id, "artifact", "/no/such/film.gif", "videos", 0, 0]])
    assert steps(client, run.run_id, "model_loss") == [4, 8]


def test_what_a_stage_could_not_send_is_sent_by_the_next(tree, server, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(record, "PATIENCE", 1.0)
    client = mlflow.MlflowClient(server.uri)
    with tracking.run("train", PARAMS) as run:
        server.send(signal.SIGSTOP)  # it takes requests and never answers
        run.metrics({"model_loss": 1.0}, 4)
        run.video("train_openl", np.zeros((2, 8, 8, 3), np.uint8), 4, fps=10)
    server.send(signal.SIGCONT)
    told = capfd.readouterr().err
    assert f".mario/unsent/{run.run_id}.jsonl" in told and told.count("\n") == 2
    assert client.get_run(run.run_id).info.status == "RUNNING"
    with tracking.run("evaluate", PARAMS):
        assert steps(client, run.run_id, "model_loss") == [4]
        assert client.get_run(run.run_id).info.status == "FINISHED"
        assert client.list_artifacts(run.run_id, "videos/train_openl")
    assert not list((tree / ".mario/unsent").iterdir())


def test_a_stage_that_was_killed_at_once_is_marked_by_the_next(client, tree):
    code = (
        "import signal, sys\nfrom pathlib import Path\nfrom stages import params, paths, tracking\n"
        "paths.ROOT = Path(sys.argv[1])\n"
        "with tracking.run('train', params.load()) as run:\n    print(run.run_id, flush=True)\n    signal.pause()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tree)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    run_id = process.stdout.readline().strip()
    with tracking.run("render", PARAMS):
        assert client.get_run(run_id).info.status == "RUNNING"
    process.kill()
    process.communicate()
    with tracking.run("render", PARAMS):
        run = client.get_run(run_id)
        assert run.info.status == "KILLED"
        assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == "KILLED"
    assert not list((tree / ".mario/running").iterdir())


def test_git_state(tree, monkeypatch):
    assert git.state() == (None, None)
    command = ["git", "-C", str(tree), "-c", "user.name=m", "-c", "user.email=m@localhost"]
    subprocess.run([*command, "init", "-q"], check=True)
    for name in ("code.py", "dvc.lock"):
        (tree / name).write_text("1")
    subprocess.run([*command, "add", "."], check=True)
    subprocess.run([*command, "commit", "-q", "-m", "first"], check=True)
    head = subprocess.run([*command, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (tree / "dvc.lock").write_text("2")
    assert git.state() == (head, False)
    (tree / "new.py").write_text("")
    assert git.state() == (head, True)
    monkeypatch.setenv("PATH", "")
    assert git.state() == (None, None)
