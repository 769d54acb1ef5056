"""The registered model: played by MLflow from its own files, it acts as the agent does."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamer import checkpoint
from dreamer.agent import Agent
from dreamer.config import EnvConfig
from dreamer.mario import ACTIONS, make_env
from stages import bundle, digest, params, paths, tracking

ROOT = Path(__file__).parents[1]
PARAMS = params.load(ROOT / "params.yaml")
EVALUATION = {"greedy": {"clear_rate": 0.25, "decisions_to_flag": None}, "checkpoint": {"frames": 4000, "score": 1.5}}
mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Two versions in a store of their own: (client, checkpoint of the newer, what was told of each)."""
    folder = tmp_path_factory.mktemp("registered")
    uri, told, path = f"sqlite:///{folder}/mlflow.db", [], folder / "best.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setattr(paths, "ROOT", folder)
        for room in ("dreamer", "stages"):
            shutil.copytree(ROOT / room, folder / room)
        for seed in range(2):
            torch.manual_seed(seed)
            state = checkpoint.agent_state(Agent(PARAMS.agent, PARAMS.compute, len(ACTIONS)))
            checkpoint.save(path, {**state, "frames": 4000, "score": 1.5})
            card = f"# Card of seed {seed}\n"
            made = bundle.write(folder / "bundle", checkpoint.load(path), PARAMS.env.to_dict(), card=card)
            with tracking.run("evaluate", PARAMS, {"data_sha256": "d"}) as run:
                told.append(run.log_model(made, PARAMS, EVALUATION, {"trained_by": "someone"}))
        yield mlflow.MlflowClient(uri, uri), path, told


@pytest.fixture
def model(registered):
    mlflow.set_tracking_uri(registered[2][1]["tracking_uri"])
    return mlflow.pyfunc.load_model("models:/mario-dreamer@challenger")


@pytest.fixture
def policy(registered):
    agent = checkpoint.load_agent(registered[1], PARAMS.compute)
    return lambda greedy=False: agent.policy(greedy)


def test_the_newest_version_is_the_challenger(registered):
    client, _, told = registered
    assert [each["version"] for each in told] == ["1", "2"]
    newest = told[1]
    assert newest == {
        "name": "mario-dreamer",
        "version": "2",
        "alias": "challenger",
        "run_id": newest["run_id"],
        "tracking_uri": newest["tracking_uri"],
        "weights_sha256": newest["weights_sha256"],
        "champion": None,
    }
    version = client.get_model_version_by_alias("mario-dreamer", "challenger")
    assert (version.version, version.run_id) == (2, newest["run_id"])
    assert version.tags["greedy.clear_rate"] == "0.25" and version.tags["checkpoint.score"] == "1.5"
    assert (version.tags["profile"], version.tags["trained_by"]) == (PARAMS.profile, "someone")
    assert (version.tags["run_id"], version.tags["data_sha256"]) == (newest["run_id"], "d")
    assert {"git.commit", "git.dirty", "rom_sha256"} <= version.tags.keys()
    assert client.get_model_version("mario-dreamer", "1").aliases == []
    assert version.description == "# Card of seed 1\n"


def test_its_files_are_known_by_their_hashes(registered, tmp_path):
    client, _, told = registered
    tags = client.get_model_version("mario-dreamer", "2").tags
    mlflow.set_tracking_uri(told[1]["tracking_uri"])
    files = Path(mlflow.artifacts.download_artifacts("models:/mario-dreamer/2", dst_path=str(tmp_path / "2")))
    assert digest.tree_sha256(files) == tags["artifact_sha256"]
    weights = digest.sha256(bundle.find(files) / bundle.WEIGHTS)
    assert weights == tags["weights_sha256"] == told[1]["weights_sha256"] != told[0]["weights_sha256"]
    (files / "code/stages/rollout.py").write_text("print('planted')")
    assert digest.tree_sha256(files) != tags["artifact_sha256"]


@pytest.mark.parametrize("greedy", [True, False])
def test_plays_an_episode_as_the_agent_does(model, policy, greedy):
    env, policy = make_env(EnvConfig.from_dict(PARAMS.env.to_dict() | {"time_limit": 60})), policy(greedy)
    obs, _ = env.reset(seed=3)
    torch.manual_seed(1)
    first, ended, generators = True, False, [torch.get_rng_state()] * 2
    while not ended:
        torch.set_rng_state(generators[0])
        expected = policy(obs[None], np.array([first]))
        generators[0] = torch.get_rng_state()
        torch.set_rng_state(generators[1])
        action = model.predict(obs[None], params={"deterministic": greedy})
        generators[1] = torch.get_rng_state()
        assert action.dtype == np.int64 and action.tolist() == expected.tolist()
        obs, _, terminated, truncated, _ = env.step(int(action[0]))
        first, ended = False, terminated or truncated
    env.close()


def test_remembers_until_it_is_reset_or_the_games_change(model):
    frames = np.random.default_rng(0).integers(0, 256, (40, 3, 64, 64, 3), np.uint8)
    player = model.unwrap_python_model()

    def memory(frames: np.ndarray, **flags: bool) -> np.ndarray:
        model.predict(frames, params={"deterministic": True, **flags})
        return player._policy.state[1].numpy().copy()

    fresh, later = memory(frames[0]), memory(frames[0])
    assert not np.allclose(fresh, later)
    np.testing.assert_array_equal(memory(frames[0], reset=True), fresh)
    assert memory(frames[0, :2]).shape[0] == 2
    np.testing.assert_array_equal(memory(frames[0]), fresh)


def test_wrong_frames_are_refused_in_one_line(model):
    player = model.unwrap_python_model()
    for frames in (np.zeros((64, 64, 3), np.uint8), np.zeros((1, 64, 64, 3)), np.zeros((0, 64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"^frames must be \(N, 64, 64, 3\) uint8, got .*$"):
            player.predict(None, frames)
    with pytest.raises(mlflow.MlflowException, match="does not match expected"):
        model.predict(np.zeros((1, 32, 64, 3), np.uint8))


def test_plays_in_a_process_that_does_not_know_the_repository(registered, tmp_path):
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [path for path in sys.path if path not in ("", sys.argv[2])]
import mlflow
import numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/mario-dreamer@challenger")
actions = model.predict(np.zeros((2, 64, 64, 3), np.uint8), params={"deterministic": True})
import dreamer, stages
print(actions.tolist(), dreamer.__file__, stages.__file__, sep="\\n")
"""
    command = [sys.executable, "-c", code, registered[2][1]["tracking_uri"], str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    actions, *files = done.stdout.splitlines()
    assert len(actions.split(",")) == 2
    assert not any(Path(file).is_relative_to(ROOT / room) for file in files for room in ("dreamer", "stages"))
