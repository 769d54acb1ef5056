"""The command lines as a user meets them: real processes in a copy of the repository."""

import re

import pytest
from clones import ROOT, copy, run

from pipeline import graph
from pipeline.demo import choose_debug
from stages.__main__ import SCRIPTS

STAGES = tuple(graph.load(ROOT / "dvc.yaml"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A copy for tests that change nothing."""
    return copy(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def tree(tmp_path):
    return copy(tmp_path)


def assert_one_line(done, *parts: str) -> None:
    """Exit code 1 and one line on stderr that has all `parts`."""
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"error: .+\n", done.stderr), done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def imported(done) -> set[str]:
    """The modules that a process under `-X importtime` loaded."""
    return set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))


def test_every_stage_can_be_named():
    assert set(STAGES) < set(SCRIPTS)


def test_help_lists_the_commands_without_importing_what_they_need(shared):
    done = run(shared, "python", "-X", "importtime", "-m", "pipeline.cli", "--help")
    assert done.returncode == 0
    assert not imported(done) & {"dvc", "docker", "mlflow", "prefect", "torch", "numpy"}
    listed = "demo run status play image deploy doctor models promote rollback lineage reproduce ui"
    for command in listed.split():
        assert re.search(rf"^ +{command} ", done.stdout, re.MULTILINE)


def test_an_unknown_command_is_an_error_that_lists_the_known_ones(shared):
    done = run(shared, "python", "-m", "pipeline.cli", "dmeo")
    assert done.returncode == 2
    assert "'dmeo'" in done.stderr and "demo" in done.stderr


@pytest.mark.parametrize("module", ["pipeline.launch", "stages"])
@pytest.mark.parametrize("given", [["tarin"], []])
def test_an_unknown_stage_is_one_line_that_lists_the_stages(shared, module, given):
    assert_one_line(run(shared, "python", "-m", module, *given), "unknown stage", *given, *STAGES)


def test_an_unknown_runner_is_named(shared):
    done = run(shared, "python", "-m", "pipeline.launch", "train", env={"MARIO_RUNNER": "rocket"})
    assert_one_line(done, "MARIO_RUNNER", "'rocket'", "process")


@pytest.mark.parametrize(
    "command", [["pipeline.launch", "train"], ["pipeline.cli", "demo"], ["pipeline.cli", "status"]]
)
def test_outside_the_root_is_an_error_that_says_so(shared, command, tmp_path):
    done = run(tmp_path, "python", "-m", *command, env={"PYTHONPATH": str(shared)})
    assert_one_line(done, "dvc.yaml", "root")


WRONG = {
    "unknown": (r"^(  steps: 400000.*)$", r"\1\n  step: 3", ("train.step:", "unknown parameter", "train_ratio")),
    "missing": (r"^  fps: 20\n", "", ("render.fps:", "missing parameter")),
    "unknown in the profile": (
        r"(?s)(^  debug:.*?render: )\{\}",
        r"\1{fsp: 3}",
        ("profiles.debug.render.fsp:", "unknown", "fps"),
    ),
    "mistyped": (r"^seed: 0", "seed: zero", ("seed:", "expected int", "'zero'")),
    "exponent without a dot": (r"eps: 1\.0e-8", "eps: 1e-8", ("optimizers.model.eps:", "expected float", "1e-08")),
    "out of range": (r"^  level: .*", '  level: "9-1"', ("env.level:", "9-1")),
    "profile": (r"^profile: debug", "profile: fast", ("profile:", "'fast'", "debug", "gpu_optimized")),
    "no YAML": (r"^env:", "env: [", ("params.yaml:", "YAML")),
    "no mapping": (r"(?s).*", "just words", ("params.yaml:", "mapping")),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_in_params_yaml_is_one_line_whatever_the_stage(tree, kind):
    pattern, replacement, parts = WRONG[kind]
    path = tree / "params.yaml"
    changed, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert count
    path.write_text(changed)
    for stage in ("collect", "report"):
        assert_one_line(run(tree, "python", "-m", "pipeline.launch", stage), *parts)


def test_an_error_in_params_yaml_comes_before_slow_imports(tree):
    (tree / "params.yaml").write_text("{}")
    done = run(tree, "python", "-X", "importtime", "-m", "stages", "train")
    assert done.returncode == 1
    assert "stages.params" in imported(done)
    assert not imported(done) & {"torch", "numpy", "mlflow", "gymnasium"}


def test_a_stage_without_its_input_says_what_to_do(tree):
    assert_one_line(run(tree, "python", "-m", "stages", "report"), "not found", "dvc repro")


def test_a_stage_has_its_own_exit_code_and_its_pipeline_s_key(tree):
    """The launcher becomes the stage: no process in between that could swallow a signal."""
    (tree / "stages" / "report.py").write_text(
        "import os, sys\n"
        "def main():\n"
        "    print(os.environ['MARIO_PIPELINE_KEY'], os.environ['DO_NOT_TRACK'], os.getpid())\n"
        "    sys.exit(7)\n"
    )
    shell = 'python -m pipeline.launch report & wait $! ; echo "code $? pid $!"'
    done = run(tree, "bash", "-c", shell)
    key, silent, pid = done.stdout.splitlines()[0].split()
    assert done.stdout.splitlines()[1] == f"code 7 pid {pid}"
    assert silent == "true"
    assert key.partition("-")[0] == pid  # no dvc above it: a pipeline of its own
    given = run(tree, "python", "-m", "pipeline.launch", "report", env={"MARIO_PIPELINE_KEY": "mine"})
    assert given.stdout.split()[0] == "mine"


def test_stages_of_one_dvc_share_a_key_and_end_with_it(tree):
    """Ctrl-C aside: a dvc that is killed takes its stage along, and the stage has time to save."""
    stage = (
        "import os, pathlib, signal, sys, time\n"
        "def bye(signum, frame):\n"
        "    pathlib.Path('saved').write_text('yes')\n"
        "    sys.exit(143)\n"
        "def main():\n"
        "    signal.signal(signal.SIGTERM, bye)\n"
        "    pathlib.Path('key').write_text(os.environ['MARIO_PIPELINE_KEY'])\n"
        "    time.sleep(60)\n"
    )
    (tree / "stages" / "collect.py").write_text(stage)
    shell = (
        "git init -q . && { dvc repro collect & pid=$!; "
        "until [ -s key ]; do kill -0 $pid || exit 3; sleep 0.1; done; "
        "kill -9 $pid; for i in $(seq 100); do [ -e saved ] && break; sleep 0.1; done; echo $pid; }"
    )
    done = run(tree, "bash", "-c", shell)
    assert (tree / "saved").exists(), done.stderr
    assert (tree / "key").read_text().startswith(f"{done.stdout.split()[-1]}-")


def test_ctrl_c_is_no_traceback(tree):
    (tree / "stages" / "report.py").write_text("def main():\n    raise KeyboardInterrupt\n")
    done = run(tree, "python", "-m", "stages", "report")
    assert (done.returncode, done.stderr) == (130, "")


def test_demo_sets_one_word_of_params_yaml(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    path = tree / "params.yaml"
    original = path.read_text()
    choose_debug()
    assert path.read_text() == original
    assert capsys.readouterr().out == ""
    path.write_text(original.replace("profile: debug", "profile: explore  # mine"))
    choose_debug()
    assert path.read_text() == original.replace("profile: debug", "profile: debug  # mine")
    assert "it was explore" in capsys.readouterr().out


def test_demo_fails_with_its_stage(tree):
    """With DVC's exit code, and the stage's own words."""
    path = tree / "params.yaml"
    path.write_text(re.sub("(?m)^seed: 0", "seed: zero", path.read_text()))
    run(tree, "git", "init", "-q", ".")
    done = run(tree, "python", "-m", "pipeline.cli", "demo")
    assert done.returncode not in (0, None)
    assert "error: seed: expected int" in done.stderr
    assert "report" not in done.stdout


def test_status_tells_what_has_not_run_and_what_is_unfinished(tree):
    run(tree, "git", "init", "-q", ".")
    work = tree / ".mario" / "progress" / "train-0123456789abcdef"
    work.mkdir(parents=True)
    (work / "notes.json").write_text('{"finished": false}')
    (work / "losses.csv").write_text("frames,model_loss\n400,3\n800,2\n")
    done = run(tree, "python", "-m", "pipeline.cli", "status")
    assert done.returncode == 0, done.stderr
    assert [line.split(maxsplit=1) for line in done.stdout.splitlines()[:5]] == [
        [name, "not run yet"] for name in STAGES
    ]
    assert "train stopped at 800 frames" in done.stdout


def test_ui_without_runs_says_so(shared):
    assert_one_line(run(shared, "python", "-m", "pipeline.cli", "ui"), "mlflow.db", "no runs")
