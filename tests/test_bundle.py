"""Bundles: what is written is what is read, and nothing else passes for it."""

import json
import re
import shutil

import pytest
import torch
from agents import CPU, small_agent
from clones import run

from dreamer import checkpoint
from stages import bundle, digest
from stages.agents import load_agent
from stages.bundle import BundleError


@pytest.fixture
def state():
    return {**checkpoint.agent_state(small_agent()), "frames": 400, "score": 1.5}


def test_an_agent_comes_back_as_it_was(tmp_path, state):
    path = bundle.write(tmp_path / "bundle", state, {"level": "1-1"}, {"seed": 3}, "# Card\n")
    assert sorted(file.name for file in path.iterdir()) == ["card.md", "config.json", "weights.safetensors"]
    weights = load_agent(path, CPU).state_dict()
    assert weights.keys() == state["weights"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state["weights"].items())
    config = bundle.read_config(path)
    assert (config["env"], config["lineage"], config["frames"], config["score"]) == (
        {"level": "1-1"},
        {"seed": 3},
        400,
        1.5,
    )
    assert (path / "card.md").read_text() == "# Card\n"


def test_half_the_size_for_nearly_the_same_agent(tmp_path, state):
    whole, half = (bundle.write(tmp_path / str(k), state, {}, half=bool(k)) for k in range(2))
    sizes = [(path / bundle.WEIGHTS).stat().st_size for path in (whole, half)]
    assert sizes[1] < 0.51 * sizes[0]
    weights = load_agent(half, CPU).state_dict()
    for name, tensor in state["weights"].items():
        if not name.startswith(bundle.SLOW):
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(weights[name], weights[name.replace("slow_critic", "critic")])


def test_a_bundle_is_found_in_an_mlflow_model_s_directory_and_nowhere_else(tmp_path, state):
    assert bundle.find(tmp_path) is None
    path = bundle.write(tmp_path / "model/artifacts/bundle", state, {})
    assert bundle.find(tmp_path / "model") == bundle.find(path) == path


def damaged(path, kind):
    weights, config = path / bundle.WEIGHTS, path / bundle.CONFIG
    content = bytearray(weights.read_bytes())
    if kind == "a bit of the weights":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif kind == "no weights":
        weights.unlink()
    elif kind == "half a config":
        config.write_text(config.read_text()[:40])
    elif kind == "another format":
        config.write_text(json.dumps({**json.loads(config.read_text()), "format": 99}))
    else:
        weights.write_bytes(b"no tensors")
        config.write_text(json.dumps({**json.loads(config.read_text()), "weights_sha256": digest.sha256(weights)}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("a bit of the weights", "SHA-256 differs"),
        ("no weights", r"weights\.safetensors: missing"),
        ("half a config", r"config\.json: damaged"),
        ("another format", "format 99"),
        ("no tensors", r"weights\.safetensors: damaged"),
    ],
)
def test_what_was_damaged_is_told_in_one_line(tmp_path, state, kind, words):
    path = bundle.write(tmp_path / "bundle", state, {})
    damaged(path, kind)
    with pytest.raises(BundleError, match=words) as told:
        load_agent(path, CPU)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_weights_that_are_no_numbers_are_refused(tmp_path, state):
    state["weights"]["actor_critic.actor.output.bias"][2] = torch.nan
    with pytest.raises(BundleError, match=r"actor\.output\.bias holds values that are no numbers"):
        load_agent(bundle.write(tmp_path / "bundle", state, {}), CPU)


def test_a_tree_s_hash_tells_every_change_but_what_loading_adds(tmp_path):
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner/a").write_text("1")
    (tree / "b").write_text("2")
    before = digest.tree_sha256(tree)
    (tree / "inner/__pycache__").mkdir()
    (tree / "inner/__pycache__/a.pyc").write_text("3")
    (tree / "registered_model_meta").write_text("4")
    assert digest.tree_sha256(tree) == before
    for path, text in (("inner/a", "2"), ("inner/c", ""), ("b", "2 ")):
        other = tmp_path / f"other-{path.replace('/', '-')}"
        shutil.copytree(tree, other)
        (other / path).write_text(text)
        assert digest.tree_sha256(other) != before


def test_a_hash_of_dvc_s_is_the_one_that_dvc_gives(tmp_path):
    for name in ("t/a", "t/s/x", "t/s/b/y", "t/s2/z", "t/s-a", "f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for command in (["init", "--no-scm", "-q"], ["add", "-q", "t", "f"]):
        done = run(tmp_path, "dvc", *command)
        assert done.returncode == 0, done.stderr
    for name in ("t", "f"):
        told = re.search(r"md5: (\S+)", (tmp_path / f"{name}.dvc").read_text())
        assert digest.dvc_md5(tmp_path / name) == told[1]
    assert digest.dvc_md5(tmp_path / "nothing") is None
