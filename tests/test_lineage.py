"""Where a model comes from, and the commands that build it again."""

import re

import pytest
import yaml
from clones import ROOT, copy, run

from pipeline import lineage, revision
from pipeline.errors import UserError
from stages import lineage as collected
from stages import params, paths


def put(values: dict, change: str) -> None:
    """As `dvc exp run -S` does."""
    key, _, text = change.partition("=")
    *groups, name = key.split(".")
    for group in groups:
        values = values.setdefault(group, {})
    values[name] = yaml.safe_load(text)


@pytest.mark.parametrize(
    "edits",
    [
        [],
        [(r"^profile: debug", "profile: explore")],
        [
            (r"^  free_nats: 0.6", "  free_nats: 0.7"),
            (r"^    collect: \{steps: 4000\}", "    collect: {steps: 5000, envs: 1}"),
        ],
        [
            (r"probabilities: \[1, 1, 1, 1, 1, 1, 1\]", "probabilities: [1, 2, 1, 1, 1, 1, 1]"),
            (r'level: "1-1"', 'level: "1-2"'),
        ],
    ],
)
def test_the_recorded_parameters_come_out_of_the_committed_ones(tmp_path, edits):
    committed = (ROOT / "params.yaml").read_text()
    committed = re.sub(r"(?m)^profile: \S+", "profile: debug", committed)
    then = committed
    for pattern, text in edits:
        then, count = re.subn(pattern, text, then, flags=re.MULTILINE)
        assert count == 1
    path = tmp_path / "params.yaml"
    path.write_text(then)
    recorded = params.load(path).to_dict()
    values = yaml.safe_load(committed)
    changes = lineage.overrides(recorded, yaml.safe_load(committed))
    assert bool(changes) == bool(edits)
    for change in changes:
        put(values, change)
    path.write_text(yaml.safe_dump(values))
    assert params.load(path).to_dict() == recorded


def test_a_commit_that_is_not_here_is_told():
    with pytest.raises(UserError, match="commit 0000000 is not in this repository; fetch it"):
        lineage.at_commit("0000000")


@pytest.mark.parametrize(
    ("dirty", "changed", "told"),
    [
        (False, ["stages/train.py"], []),
        (True, ["params.yaml"], []),  # what it said is recorded
        (True, ["params.yaml", "stages/train.py"], ["stages/train.py"]),
        (True, [], ["files that are not known any more"]),
    ],
)
def test_what_no_commit_holds_is_told(dirty, changed, told):
    assert lineage._uncommitted({"trained": {"dirty": dirty}, "code": {"changed": changed}}) == told


def test_dvc_s_lock_is_believed_only_if_it_names_these_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert collected.lock() == {"lock_sha256": None, "lock_names_checkpoints": False}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.pt").write_text("weights")
    (tmp_path / "dvc.yaml").write_text("stages: {train: {cmd: 'true', outs: [checkpoints]}}")
    for command in (["init", "--no-scm", "-q"], ["commit", "--force", "-q"]):
        done = run(tmp_path, "dvc", *command)
        assert done.returncode == 0, done.stderr
    assert collected.lock()["lock_names_checkpoints"] is True
    (tmp_path / "checkpoints/best.pt").write_text("others")
    assert collected.lock()["lock_names_checkpoints"] is False


def test_the_files_that_differ_are_named(tmp_path, monkeypatch):
    tree = copy(tmp_path)
    for command in ("git init -q .", "git add -A", "git commit -q -m state"):
        assert run(tree, *command.split()).returncode == 0
    monkeypatch.setattr(paths, "ROOT", tree)
    monkeypatch.chdir(tree)
    (tree / "dvc.lock").write_text("")
    (tree / "reports/promotion.json").write_text('{"status": "PASS"}')
    assert (collected.git.state()[1], collected.git.changes()) == (False, [])
    assert revision.state() == collected.git.state()  # what a container is told is what a process finds
    (tree / "params.yaml").write_text("{}")
    (tree / "stages/new.py").write_text("")
    assert (collected.git.state()[1], collected.git.changes()) == (True, ["params.yaml", "stages/new.py"])
    assert revision.state() == collected.git.state()
