"""The five real stages, end to end with tiny networks, in a git repository of their own; and what DVC makes of them."""

import json
import re
import sqlite3

import pytest
import yaml
from clones import ROOT, commit, edit, repository, run

from pipeline import graph

STAGES = tuple(graph.load(ROOT / "dvc.yaml"))
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())


def dvc(tree, *arguments: str) -> str:
    done = run(tree, "dvc", "--wait-for-lock", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


def changed(tree) -> set[str]:
    return set(json.loads(dvc(tree, "status", "--json")))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A repository in which the pipeline ran once and all is committed."""
    tree = repository(tmp_path_factory.mktemp("tree"))
    assert ran(dvc(tree, "repro")) == list(STAGES)
    assert run(tree, "git", "status", "--porcelain").stdout == "?? dvc.lock\n"
    commit(tree)
    return tree


@pytest.fixture
def params(tree):
    """Puts params.yaml and the results back as committed."""
    yield
    assert run(tree, "git", "checkout", "-q", "params.yaml", "dvc.lock").returncode == 0
    dvc(tree, "checkout", "--force", "-q")


def test_every_out_is_there_and_nothing_else_is_to_do(tree):
    outs = [out for stage in DVC["stages"].values() for kind in ("outs", "metrics") for out in stage.get(kind, ())]
    assert [out for out in outs if not (tree / out).exists()] == []
    for name in (
        "checkpoints/best.pt",
        "checkpoints/latest.pt",
        "checkpoints/provenance.json",
        "reports/gifs/index.json",
    ):
        assert (tree / name).stat().st_size
    assert ran(dvc(tree, "repro")) == []
    assert sorted(str(path.relative_to(tree)) for path in tree.rglob(".gitignore")) == [".dvc/.gitignore", ".gitignore"]


def test_numbers_and_curves_are_dvc_s(tree):
    files = json.loads(dvc(tree, "metrics", "show", "--json"))[""]["data"]
    evaluation = files["reports/evaluation.json"]["data"]
    assert {evaluation[mode]["episodes"] for mode in ("sampled", "greedy")} == {2}
    assert files["reports/training/summary.json"]["data"]["frames"] == 640


def test_one_pipeline_run_in_mlflow_with_its_stages_below_and_a_challenger(tree):
    recording = [name for name in STAGES if "stages/tracking.py" in DVC["stages"][name]["deps"]]
    model = json.loads((tree / "reports/model.json").read_text())
    database = sqlite3.connect(f"file:{tree}/mlflow.db?mode=ro", uri=True)
    parents = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall())
    names = dict(database.execute("select run_uuid, name from runs where status = 'FINISHED'").fetchall())
    assert {"collect", "train", "evaluate"} <= set(recording)
    assert sorted(names[run_id] for run_id in parents) == sorted(recording)
    assert len(set(parents.values())) == 1
    assert set(names) == {*parents, *parents.values()}
    assert database.execute("select name, alias, version from registered_model_aliases").fetchall() == [
        (model["name"], "challenger", int(model["version"]))
    ]


def test_other_settings_rerun_what_uses_them(tree, params):
    edit(tree, "behavior: {entropy: 0.003}", "behavior: {entropy: 0.004}")  # of another profile
    assert changed(tree) == set()
    edit(tree, "behavior: {imag_horizon: 3}", "behavior: {imag_horizon: 3, entropy: 0.01}")
    assert changed(tree) == {"train", "report"}  # itself, and what shows it; those between follow from its outs
    edit(tree, "behavior: {imag_horizon: 3, entropy: 0.01}", "behavior: {imag_horizon: 3}")
    edit(tree, "\n  entropy: 0.001 ", "\n  entropy: 0.01 ")  # of the defaults
    assert changed(tree) == {"train", "report"}
    edit(tree, "\n  entropy: 0.01 ", "\n  entropy: 0.001 ")
    edit(tree, "\n  fps: 20\n", "\n  fps: 12\n")
    assert changed(tree) == {"render", "report"}


def test_an_experiment_runs_only_what_it_changes_and_can_be_compared(tree, params):
    """And the plots page is made from curves of both."""
    assert ran(dvc(tree, "exp", "run", "-S", "profiles.tiny.render.fps=20")) == ["render", "report"]
    assert json.loads(dvc(tree, "params", "diff", "--json")) == {
        "params.yaml": {"profiles.tiny.render.fps": {"old": 10, "new": 20, "diff": 10}}
    }
    assert json.loads(dvc(tree, "metrics", "diff", "--json")) == {}
    plots = json.loads(dvc(tree, "plots", "diff", "HEAD", "--json"))["data"]
    assert {"losses", "evaluations", "episodes"} <= {key.rpartition("::")[2] for key in plots}
    assert all(len(plot[0]["revisions"]) == 2 for plot in plots.values())


def test_results_travel_through_a_remote(tree, tmp_path):
    dvc(tree, "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    dvc(tree, "push")
    clone = tmp_path / "clone"
    assert run(tree, "git", "clone", "-q", str(tree), str(clone)).returncode == 0
    dvc(clone, "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    dvc(clone, "pull")
    assert changed(clone) == set()
    assert (clone / "checkpoints/best.pt").read_bytes() == (tree / "checkpoints/best.pt").read_bytes()


def test_an_exported_tree_within_another_repository_finds_all_done(tree, tmp_path):
    """No git of its own: as `make setup` arranges it."""
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "deep" / "export"
    inner.mkdir(parents=True)
    assert run(outer, "git", "init", "-q", ".").returncode == 0
    assert run(tree, "bash", "-c", f"git archive HEAD | tar x -C '{inner}'").returncode == 0
    dvc(inner, "config", "--local", "core.no_scm", "true")
    dvc(inner, "cache", "dir", "--local", str(tree / ".dvc/cache"))
    dvc(inner, "checkout")
    assert ran(dvc(inner, "repro")) == []
    assert list(inner.glob("data/**/.gitignore")) == []


def test_a_registered_model_tells_where_it_comes_from_and_is_built_again_bit_by_bit(tree, tmp_path):
    done = run(tree, "mario", "lineage", "challenger", "--json")
    assert done.returncode == 0, done.stderr
    told, first = json.loads(done.stdout), run(tree, "git", "rev-parse", "HEAD~1").stdout.strip()
    outs = {
        out["path"]: out["md5"] for out in yaml.safe_load((tree / "dvc.lock").read_text())["stages"]["train"]["outs"]
    }
    assert (told["data"]["replay_md5"], told["data"]["checkpoints_md5"]) == (outs["data/replay"], outs["checkpoints"])
    assert told["dvc"]["lock_names_checkpoints"] is True and len(told["dvc"]["lock_sha256"]) == 64
    assert (told["code"]["commit"], told["code"]["dirty"], told["code"]["changed"]) == (first, False, [])
    assert (told["trained"]["commit"], told["trained"]["profile"], told["params"]["env"]["time_limit"]) == (
        first,
        "tiny",
        30,
    )
    assert told["weights_sha256"] == json.loads((tree / "reports/model.json").read_text())["weights_sha256"]
    assert told["evaluation"]["sampled"]["episodes"] == 2 and told["environment"]["versions"]["torch"]

    clone = tmp_path / "again"
    done = run(tree, "mario", "reproduce", "challenger", "--run", "--directory", str(clone))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"git checkout --quiet --detach {first}\nmake setup\n.venv/bin/dvc repro\n" in done.stdout
    assert "weights: the same, bit by bit" in done.stdout
    assert (clone / "reports/report.html").exists() and run(tree, "git", "worktree", "list").stdout.count("\n") == 1
    done = run(tree, "mario", "reproduce", "challenger", "--run", "--directory", str(clone))
    assert done.returncode == 1 and re.fullmatch(rf"error: {clone}: is there already; .*\n", done.stderr)
