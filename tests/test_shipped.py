"""The agent that ships: exported from a real training, registered as champion where there is none."""

import json
import shutil
from pathlib import Path

import pytest
from clones import repository, run

from stages import bundle

ENROLL = "from pipeline import shipped; print(shipped.enroll())"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A repository with a short training, and its agent as the one that ships."""
    tree = repository(tmp_path_factory.mktemp("trained"))
    shutil.rmtree(tree / "pretrained", ignore_errors=True)
    for command in (
        ["collect"],
        ["train"],
        ["export", "tiny run", "--episodes", "3", "--seed", "70", "--note", "Made by a test.", "--to", "pretrained"],
    ):
        done = run(tree, "python", "-m", "stages", *command)
        assert done.returncode == 0, done.stderr
    for path in (tree / "mlflow.db", tree / "mlartifacts"):  # as a clone has none
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tree


@pytest.fixture
def tree(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "tree"))


def aliases(tree: Path) -> dict[str, str]:
    ask = "from pipeline.registry import Registry; import json; print(json.dumps(Registry().aliases()))"
    done = run(tree, "python", "-c", ask)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_exported_says_what_it_is(trained):
    config = bundle.read_config(trained / "pretrained")
    lineage, summary = config["lineage"], json.loads((trained / "reports/training/summary.json").read_text())
    assert lineage["training"] == summary and summary["decisions"] == 160
    assert lineage["params"]["profile"] == "tiny" and lineage["trained"]["seed"] == 0
    sampled = lineage["evaluation"]["sampled"]
    assert sampled["episodes"] == 3 and [each["seed"] for each in sampled["failures"]] == [70, 71, 72]
    card = (trained / "pretrained/card.md").read_text()
    assert f"a training of 160 decisions, {summary['updates']} updates" in card and "\nMade by a test.\n" in card
    assert all(
        f"- start {each['seed']}: {each['outcome']} at x {each['best_x']}" in card for each in sampled["failures"]
    )
    for name in ("episodes.csv", "evaluations.csv"):
        assert (trained / "pretrained/curves/tiny run" / name).read_bytes() == (
            trained / "reports/training" / name
        ).read_bytes()


def test_what_is_told_is_what_it_plays(trained):
    done = run(trained, "mario", "play", "--model", "pretrained", "--episodes", "3", "--seed", "70", "--json")
    played = json.loads(done.stdout)
    told = bundle.read_config(trained / "pretrained")["lineage"]["evaluation"]["sampled"]
    assert played["return_mean"] == told["return_mean"]
    assert [row["best_x"] for row in played["episodes"]] == [each["best_x"] for each in told["failures"]]


def test_it_is_champion_where_there_is_none_and_only_once(tree):
    done = run(tree, "python", "-c", ENROLL)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "1", done.stderr
    assert "version 1 is champion: ships with the repository: clears 0.0% of 3 held-out episodes" in done.stdout
    assert aliases(tree) == {"champion": "1"}
    assert "shipped by" in run(tree, "mario", "models", "--history").stdout
    done = run(tree, "python", "-c", ENROLL)
    assert done.stdout.strip() == "None", done.stderr
    done = run(tree, "mario", "play", "--model", "champion", "--episodes", "1", "--json")
    assert json.loads(done.stdout)["checkpoint"].endswith("artifacts/bundle"), done.stderr
    lineage = run(tree, "mario", "lineage", "champion")
    assert lineage.returncode == 0 and "tiny" in lineage.stdout


def test_a_challenger_stays_challenger(tree):
    done = run(tree, "python", "-m", "stages", "evaluate")
    assert done.returncode == 0, done.stderr
    assert aliases(tree) == {"challenger": "1"}
    assert run(tree, "python", "-c", ENROLL).returncode == 0
    assert aliases(tree) == {"challenger": "1", "champion": "2"}


def test_a_damaged_one_is_told_and_nothing_is_registered(tree):
    with (tree / "pretrained" / bundle.WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00" if file.read(1) != b"\x00" else b"\x01")
    done = run(tree, "python", "-c", ENROLL)
    assert done.stdout.strip() == "None" and "not the weights that config.json was written with" in done.stderr
    assert not (tree / "mlflow.db").exists()


def test_too_large_an_agent_does_not_ship(trained, monkeypatch):
    from stages import export

    monkeypatch.chdir(trained)
    monkeypatch.setattr(export, "LIMIT", 1000)
    monkeypatch.setattr("sys.argv", ["export", "again"])
    with pytest.raises(bundle.BundleError, match="at most 0 ship; train smaller ones"):
        export.main()
