"""The train stage as processes: interrupted in every way it goes on where it was, and bad input costs nothing."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from clones import copy, run

PROFILE = """
  short:
    env: {time_limit: 60}
    collect: {steps: 512}
    archive: {share: 0.5, practice: 0.5, cell: 16}
    replay: {chunk_length: 32}
    model: {deter: 16, stoch: 4, classes: 4, hidden: 16, depth: 2, units: 16, layers: 1}
    losses: {}
    behavior: {imag_horizon: 3}
    optimizers: {}
    compute: {device: cpu}
    train:
      steps: 3000
      batch_size: 2
      batch_length: 8
      train_ratio: 2
      video_pred_log: false
      eval_every: 1200
      eval_episodes: 2
      checkpoint_every: 200
      log_every: 100
    evaluate: {episodes: 2}
    render: {}
"""
OUTS = ("data/replay", "checkpoints", "reports")


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """A copy of the project with seed data."""
    tree = copy(tmp_path_factory.mktemp("collected"))
    params = tree / "params.yaml"
    params.write_text(params.read_text().replace("\nprofile: debug\n", "\nprofile: short\n") + PROFILE)
    done = run(tree, "python", "-m", "stages", "collect")
    assert done.returncode == 0, done.stderr
    return tree


@pytest.fixture
def tree(collected, tmp_path) -> Path:
    return Path(shutil.copytree(collected, tmp_path / "tree"))


def train(tree: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    done = run(tree, "python", "-m", "stages", "train", env={"OMP_NUM_THREADS": str(processes)})
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    return done


def begin(tree: Path, processes: int = 1) -> subprocess.Popen:
    """A train process, the first of a group, that has written a checkpoint of its own and works on."""
    begun = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "train"],
        cwd=tree,
        env=os.environ | {"OMP_NUM_THREADS": str(processes)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not any(path.stat().st_mtime > begun for path in tree.glob(".mario/progress/train-*/latest.pt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < begun + 240
        time.sleep(0.02)
    time.sleep(0.5)
    assert process.poll() is None, "training ended before it could be interrupted"
    return process


def weights(tree: Path) -> dict[str, torch.Tensor]:
    return torch.load(tree / "checkpoints/latest.pt", weights_only=True)["weights"]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def straight(collected, tmp_path_factory) -> Path:
    """The same project, trained without an interruption."""
    tree = Path(shutil.copytree(collected, tmp_path_factory.mktemp("straight") / "tree"))
    train(tree)
    return tree


def test_what_training_leaves(straight):
    assert not list(straight.glob("**/*.tmp")) and not list(straight.glob("**/*.new"))
    state = torch.load(straight / "checkpoints/latest.pt", weights_only=True)
    assert state["frames"] == 3000 and state["counters"]["decisions"] == 750
    assert "contexts" not in state["replay"] and state["posterior"] is None  # of use to further training alone
    best = torch.load(straight / "checkpoints/best.pt", weights_only=True)
    evaluations = rows(straight / "reports/training/evaluations.csv")
    assert [int(row["frames"]) for row in evaluations] == [1200, 2400, 3000]
    chosen = max(evaluations, key=lambda row: float(row["eval_return"]))
    assert best["frames"] == int(chosen["frames"]) and best["score"] == pytest.approx(float(chosen["eval_return"]))
    kept = [torch.load(path, weights_only=True) for path in sorted(straight.glob("checkpoints/snapshot-*.pt"))]
    assert [each["frames"] for each in kept] == [512, 1136, 1756, 3000]  # 0, 25, 50 and 100% of 512 to 3000
    assert not same(kept[0]["weights"], kept[1]["weights"]) and same(kept[3]["weights"], state["weights"])
    losses = rows(straight / "reports/training/losses.csv")
    assert [int(row["frames"]) for row in losses] == list(range(600, 3001, 100))
    assert all(float(row["model_loss"]) > 0 for row in losses[1:])
    summary = json.loads((straight / "reports/training/summary.json").read_text())
    assert summary["updates"] == (750 - 128) * 2 // 16
    provenance = json.loads((straight / "checkpoints/provenance.json").read_text())
    assert provenance["resumed"] == 0 and provenance["params"]["model"]["deter"] == 16
    kept = sum(int(path.name.split("-")[2]) for path in straight.glob("data/replay/*.npz"))
    episodes = rows(straight / "reports/training/episodes.csv")
    assert kept in (622 + len(episodes), 622 + len(episodes) + 1)  # a first step for every episode begun


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_interrupted_training_goes_on_and_ends_the_same(tree, straight, signum):
    process = begin(tree)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), output
    assert "Traceback" not in output and "leaked" not in output
    for out in OUTS:
        assert not list((tree / out).glob("**/*.pt")), "nothing half done is published"
    (work,) = tree.glob(".mario/progress/train-*")
    run_id = json.loads((work / "notes.json").read_text())["run_id"]
    done = train(tree)
    assert "train: goes on at" in done.stdout
    assert same(weights(tree), weights(straight))
    for snapshot in straight.glob("checkpoints/snapshot-*.pt"):
        one, two = (torch.load(path / "checkpoints" / snapshot.name, weights_only=True) for path in (tree, straight))
        assert one["frames"] == two["frames"] and same(one["weights"], two["weights"])
    for name in ("evaluations.csv", "episodes.csv"):
        clean = [{k: v for k, v in row.items() if k != "hours"} for row in rows(tree / "reports/training" / name)]
        assert clean == [
            {k: v for k, v in row.items() if k != "hours"} for row in rows(straight / "reports/training" / name)
        ]
    provenance = json.loads((tree / "checkpoints/provenance.json").read_text())
    assert provenance["resumed"] == 1 and provenance["mlflow"]["run_id"] == run_id
    client = mlflow.MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("mario-dreamer").experiment_id])
    assert [found.info.run_id for found in runs if found.data.tags.get("dvc.stage") == "train"] == [run_id]
    assert client.get_run(run_id).info.status == "FINISHED"
    logged = {metric.step for metric in client.get_metric_history(run_id, "model_loss")}
    assert logged >= set(range(700, 3001, 100))


def test_a_team_of_processes_interrupted_goes_on_and_ends_the_same(collected, tree, tmp_path):
    """By Ctrl-C, which a terminal sends to all of them; and when the first is killed, the others end too."""
    straight = Path(shutil.copytree(collected, tmp_path / "straight"))
    train(straight, processes=2)
    process = begin(tree, processes=2)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output and "leaked" not in output
    process = begin(tree, processes=2)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len([each for each in family if "spawn_main" in " ".join(each.cmdline())]) == 1
    process.kill()
    process.communicate(timeout=120)
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert "train: goes on at" in train(tree, processes=2).stdout
    assert same(weights(tree), weights(straight))


def test_changed_inputs_start_afresh_and_the_unfinished_stays(tree):
    process = begin(tree)
    process.kill()
    process.communicate()
    params = tree / "params.yaml"
    params.write_text(params.read_text().replace("behavior: {imag_horizon: 3}", "behavior: {imag_horizon: 4}"))
    done = train(tree)
    assert "goes on at" not in done.stdout and "unfinished work on other inputs stays in" in done.stdout
    assert json.loads((tree / "checkpoints/provenance.json").read_text())["resumed"] == 0
    assert len(list(tree.glob(".mario/progress/train-*/latest.pt"))) == 2


def test_two_at_once_are_refused(tree):
    process = begin(tree)
    try:
        second = run(tree, "python", "-m", "stages", "train")
        assert second.returncode == 1
        assert second.stderr.strip() == (
            f"error: train: process {process.pid} is already at work on these inputs; wait for it or end it"
        )
    finally:
        process.kill()
        process.communicate()


def test_a_result_that_dvc_could_not_record_is_taken_again(straight, tmp_path):
    tree = Path(shutil.copytree(straight, tmp_path / "tree"))
    for out in OUTS:  # as DVC does before it runs a stage
        shutil.rmtree(tree / out)
    done = train(tree)
    assert "was finished before with these inputs" in done.stdout
    assert same(weights(tree), weights(straight))
    # Once dvc.lock tells that the result was recorded, running the stage again means training again.
    (tree / "dvc.lock").write_text("stages: {train: {outs: [{path: checkpoints, md5: 0123.dir}]}}\n")
    process = begin(tree)
    process.kill()
    process.communicate()
    (work,) = tree.glob(".mario/progress/train-*")
    assert not json.loads((work / "notes.json").read_text())["finished"]


def fails(tree: Path, stage: str, *expected: str, prefix: tuple[str, ...] = (), **options) -> None:
    """The stage ends with one line that has all of `expected`, and what is published stays as it was."""
    before = {path: path.read_bytes() for out in OUTS for path in (tree / out).glob("**/*") if path.is_file()}
    done = run(tree, *prefix, "python", "-m", "stages", stage, **options)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(text in lines[0] for text in expected), lines[0]
    after = {path: path.read_bytes() for out in OUTS for path in (tree / out).glob("**/*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("damage", ["truncated", "edited"])
def test_a_damaged_chunk(tree, damage):
    path = sorted((tree / "data/seed").glob("*.npz"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content if damage == "edited" else content[: len(content) // 2])
    fails(tree, "train", str(path.relative_to(tree)), "truncated or edited", "dvc checkout")


def test_divergence_is_told_and_leaves_the_checkpoint_before(tree):
    process = begin(tree)
    process.kill()
    process.communicate()
    (latest,) = tree.glob(".mario/progress/train-*/latest.pt")
    state = torch.load(latest, weights_only=True)
    for weight in state["weights"].values():
        weight *= float("nan")
    torch.save(state, latest)
    broken = latest.read_bytes()
    fails(tree, "train", "is not finite at", "lower optimizers")
    assert latest.read_bytes() == broken


def test_a_checkpoint_of_another_architecture(straight, tmp_path):
    tree = Path(shutil.copytree(straight, tmp_path / "tree"))
    params = tree / "params.yaml"
    params.write_text(params.read_text().replace("model: {deter: 16, stoch: 4", "model: {deter: 24, stoch: 4"))
    fails(tree, "evaluate", "checkpoints/best.pt", "model.deter is 16 there and 24 in params.yaml")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_checkpoint(straight, tmp_path, content):
    tree = Path(shutil.copytree(straight, tmp_path / "tree"))
    path = tree / "checkpoints/best.pt"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    fails(tree, "evaluate", "checkpoints/best.pt: damaged", "dvc checkout")


def test_a_pickle_runs_no_code(straight, tmp_path):
    import pickle

    tree = Path(shutil.copytree(straight, tmp_path / "tree"))

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tree / 'ran'}",)

    (tree / "checkpoints/best.pt").write_bytes(pickle.dumps({"format": 1, "weights": Evil()}))
    fails(tree, "evaluate", "checkpoints/best.pt: damaged or not a checkpoint")
    torch.save({"format": 1, "weights": Evil()}, tree / "checkpoints/best.pt")
    fails(tree, "evaluate", "checkpoints/best.pt: damaged or not a checkpoint")
    assert not (tree / "ran").exists()


def test_a_missing_checkpoint(tree):
    fails(tree, "evaluate", "checkpoints/best.pt: no such checkpoint", "dvc repro train")


@pytest.mark.parametrize("place", [".mario", "."])
def test_no_permission_to_write(tree, place):
    """Root may write anywhere until it gives up that capability."""
    shutil.rmtree(tree / ".mario/progress", ignore_errors=True)
    if place == ".":
        shutil.rmtree(tree / ".mario")
    (tree / place).chmod(0o500)
    mortal = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override") if os.geteuid() == 0 else ()
    try:
        fails(tree, "train", ".mario", "no permission", prefix=mortal)
    finally:
        (tree / place).chmod(0o700)


def test_mlflow_away(tree):
    fails(tree, "train", "127.0.0.1:9", "MLFLOW_TRACKING_URI", env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
