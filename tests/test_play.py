"""`mario play` on a real, untrained agent, and the intervals it prints."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from agents import small_agent
from clones import copy, run
from PIL import Image

from dreamer import checkpoint
from stages import __main__ as entrance
from stages import bundle, params, paths, tracking
from stages.interval import bootstrap_mean, wilson


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The repository with short episodes and two checkpoints."""
    root = copy(tmp_path_factory.mktemp("tree"))
    path = root / "params.yaml"
    path.write_text(re.sub(r"time_limit: 400\b", "time_limit: 40", path.read_text()))  # of the profile debug
    for name, frames in (("best", 100), ("latest", 200)):
        state = checkpoint.agent_state(small_agent())
        checkpoint.save(root / f"checkpoints/{name}.pt", {**state, "frames": frames, "score": 1.0})
    return root


@pytest.fixture
def play(root, monkeypatch, capsys):
    """Runs `python -m stages play ARGUMENTS` in this process; gives what it prints."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(paths, "ROOT", root)

    def played(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["stages", "play", *arguments])
        entrance.main()
        return capsys.readouterr().out

    return played


def test_json_is_all_there_is_and_adds_up(play):
    result = json.loads(play("--json", "--episodes", "3", "--seed", "7"))
    assert result["checkpoint"] == "checkpoints/best.pt"
    assert [row["seed"] for row in result["episodes"]] == [7, 8, 9]
    assert all(row["outcome"] in ("death", "time limit", "flag") for row in result["episodes"])
    assert all(0 < row["decisions"] <= 40 for row in result["episodes"])
    clears = [row["clear"] for row in result["episodes"]]
    assert result["clear_rate"] == np.mean(clears)
    assert (result["clear_rate_low"], result["clear_rate_high"]) == pytest.approx(wilson(sum(clears), 3))
    assert result["return_mean"] == pytest.approx(np.mean([row["return"] for row in result["episodes"]]))
    assert result["return_low"] <= result["return_mean"] <= result["return_high"]


def test_the_same_seed_plays_the_same_and_filming_changes_nothing(play):
    arguments = ("--json", "--episodes", "2", "--seed", "3", "--level", "1-2")
    plain = json.loads(play(*arguments))
    filmed = json.loads(play(*arguments, "--save-gif", "--gif-dir", "films", "--gif-fps", "25"))
    assert plain["level"] == "1-2"
    for row, film in zip(plain["episodes"], filmed["episodes"], strict=True):
        assert row == film | {"gif": None}
        with Image.open(film["gif"]) as image:
            assert image.size == (256, 240)
            assert image.n_frames == film["decisions"] + 1
            image.seek(1)
            assert image.info["duration"] == 40
    assert sorted(path.name for path in Path("films").iterdir()) == ["1-2-sampled-seed3.gif", "1-2-sampled-seed4.gif"]


def test_the_table_for_people(play):
    lines = play("--use-latest", "--action-mode", "--episodes", "2").splitlines()
    assert lines[0] == "checkpoints/latest.pt, level 1-1, greedy play"
    assert [line.split()[0] for line in lines[2:4]] == ["1", "2"]
    assert sorted(line.split()[1] for line in lines[2:4]) == ["0", "1"]
    assert re.fullmatch(r"clear rate \d+% \[\d+%, \d+%\], mean return -?\d+ \(2 episodes\)", lines[4])
    assert len(lines) == 5


def test_no_film_is_left_of_an_episode_that_was_not_played_to_its_end(play, monkeypatch):
    from stages import gif

    add, count = gif.Writer.add, iter(range(5))

    def stop(self, frame):
        add(self, frame)
        if next(count) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(gif.Writer, "add", stop)
    with pytest.raises(SystemExit) as ended:
        play("--save-gif", "--gif-dir", "stopped")
    assert ended.value.code == 130
    assert list(Path("stopped").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "nowhere/best.pt"], ("nowhere/best.pt", "no such checkpoint")),
        (["--model", "params.yaml"], ("params.yaml", "not a checkpoint")),
        (["--model", "tests"], ("tests/best.pt", "no such checkpoint")),
        (["--model", "checkpoints/best.pt", "--use-latest"], ("checkpoints/best.pt", "no directory")),
        (["--level", "1-5"], ("--level", "1-5")),
    ],
)
def test_errors_are_one_line(play, arguments, parts):
    with pytest.raises(SystemExit) as ended:
        play(*arguments)
    assert re.fullmatch("error: .+", ended.value.code)
    assert all(part in ended.value.code for part in parts)


def test_a_damaged_bundle_is_one_line(play, root):
    made = bundle.write(root / "broken", checkpoint.load(root / "checkpoints/best.pt"), params.load().env.to_dict())
    (made / bundle.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(SystemExit, match=r"error: .*broken/weights\.safetensors: not the weights"):
        play("--model", str(made))
    with pytest.raises(SystemExit, match=r"error: --model .*broken: no directory with checkpoints"):
        play("--model", str(made), "--use-best")


@pytest.mark.parametrize("arguments", [["--episodes", "0"], ["--gif-fps", "51"], ["--seed", "-1"]])
def test_wrong_arguments_are_usage_errors(play, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        play(*arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_mario_play_hands_its_arguments_over_and_its_help_needs_neither_torch_nor_params_yaml(root, tmp_path):
    command = ("python", "-X", "importtime", "-m", "pipeline.cli", "play", "--help")
    done = run(tmp_path, *command, env={"PYTHONPATH": str(root), "PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert "--use-latest" in done.stdout
    loaded = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "stages.params" in loaded
    assert not loaded & {"torch", "numpy", "mlflow"}


def test_registered_models_play_by_version_and_alias(play, root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/registry.db")
    with pytest.raises(SystemExit, match="no registered model"):
        play("--model", "challenger")
    settings = params.load()
    with tracking.run("evaluate", settings) as record:
        made = bundle.write(root / "bundle", checkpoint.load(Path("checkpoints/latest.pt")), settings.env.to_dict())
        version = record.log_model(made, settings, {})["version"]
    by_version, by_alias = (
        json.loads(play("--model", which, "--episodes", "1", "--json")) for which in (version, "challenger")
    )
    from_file = json.loads(play("--use-latest", "--episodes", "1", "--json"))
    assert by_version == by_alias == from_file | {"checkpoint": by_alias["checkpoint"]}
    with pytest.raises(SystemExit, match=rf"'champion'.* challenger \({version}\)"):
        play("--model", "champion")
    downloaded = root / "downloaded"
    shutil.copytree(next(Path(".mario/models").iterdir()), downloaded)
    elsewhere = root / "elsewhere"  # without params.yaml, a registry or the repository
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for directory in (downloaded, made):
        offline = json.loads(play("--model", str(directory), "--episodes", "1", "--json"))
        assert offline == from_file | {"checkpoint": offline["checkpoint"]}
    kept = next((root / ".mario/models").rglob("weights.safetensors"))
    kept.write_bytes(b"damaged")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/registry.db")
    again = json.loads(play("--model", version, "--episodes", "1", "--json"))  # fetched anew
    assert again["episodes"] == from_file["episodes"]
    shutil.rmtree(elsewhere)


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [  # as in Newcombe (1998), table I, and statsmodels' proportion_confint
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (29, 29, (0.8830, 1.0)),
    ],
)
def test_wilson(successes, n, expected):
    assert wilson(successes, n) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_of_nothing_is_an_error(successes, n):
    with pytest.raises(ValueError, match="episodes"):
        wilson(successes, n)


def test_bootstrap_of_a_large_sample_is_the_normal_interval():
    values = np.random.default_rng(0).normal(100, 15, 400)
    error = values.std() / np.sqrt(400)
    low, high = bootstrap_mean(values)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error)


def test_bootstrap_depends_on_values_and_seed_alone():
    values = [1.0, 5.0, 2.0, 8.0]
    assert bootstrap_mean(values, 3) == bootstrap_mean(values, 3)
    assert bootstrap_mean(values, 3, resamples=50) != bootstrap_mean(values, 4, resamples=50)
    assert bootstrap_mean([4.0, 4.0]) == (4.0, 4.0)
    with pytest.raises(ValueError, match="no episodes"):
        bootstrap_mean([])
