"""What holds the house together: who imports whom, what DVC is told, and where the numbers live."""

import ast
import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from dreamer import config
from pipeline import graph
from stages import params
from stages.__main__ import TOLD

ROOT = Path(__file__).parents[1]
ROOMS = ("dreamer", "stages", "pipeline")
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = tuple(DVC["stages"])
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
GROUPS = [key for key, value in PARAMS.items() if isinstance(value, dict) and key not in ("profiles", "runner")]


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for room in ROOMS for path in sources(room)}


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file may import, at its top or late; `from a import b` may be the module a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def reached(path: Path) -> set[Path]:
    """The project's files that running `path` may import, itself included; empty ones say nothing."""
    seen, waiting = set(), [path]
    while waiting:
        if (file := waiting.pop()) not in seen:
            seen.add(file)
            waiting += [MODULES[name] for name in imports(file) if name in MODULES]
    return {file for file in seen if file.stat().st_size}


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("dreamer", {"stages", "pipeline", "mlflow", "dvc", "prefect", "yaml", "docker"}),
        ("stages", {"pipeline", "prefect", "docker", "dvc"}),
        ("pipeline", {"dreamer", "stages", "torch"}),
    ],
)
def test_imports_run_one_way(room, forbidden):
    assert sources(room)
    assert {path.name: found for path in sources(room) if (found := packages(path) & forbidden)} == {}


def test_one_file_of_the_stages_knows_mlflow_and_one_of_the_agent_knows_the_game():
    assert [path.name for path in sources("stages") if "mlflow" in packages(path)] == ["tracking.py"]
    game = {"gym_super_mario_bros", "nes_py"}
    assert [path.name for room in ROOMS for path in sources(room) if packages(path) & game] == ["mario.py"]


def test_params_yaml_has_one_reader():
    assert [
        path.name for room in ("dreamer", "stages") for path in sources(room) if "params.yaml" in string_constants(path)
    ] == ["params.py"]


def string_constants(path: Path) -> set[str]:
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_no_file_is_a_drawer_for_everything():
    names = {path.stem for room in ROOMS for path in sources(room)}
    assert not names & {"util", "utils", "tool", "tools", "common", "helper", "helpers", "misc"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_code_it_uses(stage):
    """The modules it imports, and the page templates and sources in C they name."""
    listed = {dep for dep in DVC["stages"][stage]["deps"] if dep.startswith(ROOMS)}
    modules = reached(ROOT / f"stages/{stage}.py")
    named = {
        path.parent / text
        for path in modules
        for text in string_constants(path)
        if text.endswith((".html", ".c", ".h"))
    }
    assert listed == {str(path.relative_to(ROOT)) for path in modules | {path for path in named if path.is_file()}}


def test_every_error_that_a_user_can_cause_is_told_in_one_line():
    defined = {
        f"{module_name(path)}.{node.name}"
        for room in ("dreamer", "stages")
        for path in sources(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and (node.name.endswith("Error") or node.name == "Diverged")
    }
    assert defined == TOLD


def test_every_command_is_the_launcher_with_the_stage_s_name():
    """The text is part of DVC's key: the same for all stages, whatever runs them."""
    commands = {name: stage["cmd"] for name, stage in DVC["stages"].items()}
    assert all(
        re.fullmatch(rf'exec env PATH="\$PWD/\.venv/bin:\$PATH" python -m pipeline\.launch {name}', cmd)
        for name, cmd in commands.items()
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tracks_the_same_groups_of_the_defaults_and_of_the_profile(stage):
    listed = DVC["stages"][stage]["params"]
    own = {key.split(".")[0] for key in listed if not key.startswith("profiles.")} - {"seed"}
    of_profile = {
        key.removeprefix("profiles.${profile}").removeprefix(".") for key in listed if key.startswith("profiles.")
    }
    assert own <= set(GROUPS)
    assert of_profile in (own, {""})


def test_outs_are_cached_so_that_the_run_cache_and_push_work():
    outs = [
        out for stage in DVC["stages"].values() for kind in ("outs", "metrics", "plots") for out in stage.get(kind, ())
    ]
    assert outs
    assert all(isinstance(out, str) for out in outs)


def test_the_graph_is_dvc_s():
    from dvc.repo import Repo

    with Repo(ROOT) as repo:
        edges = {(stage.name, other.name) for stage, other in repo.index.graph.edges}
        names = {stage.name for stage in repo.index.stages}
    ours = graph.load(ROOT / "dvc.yaml")
    assert {(name, need) for name, needs in ours.items() for need in needs} == edges
    assert set(ours) == names
    position = {name: i for i, name in enumerate(ours)}
    assert all(position[need] < position[name] for name, need in edges)


def test_the_graph_without_a_file_names_it(tmp_path):
    with pytest.raises(graph.GraphError, match=r"dvc\.yaml: not found"):
        graph.load(tmp_path / "dvc.yaml")


@pytest.mark.parametrize("profile", PARAMS["profiles"])
def test_a_profile_names_every_group_and_loads(profile, tmp_path):
    assert list(PARAMS["profiles"][profile]) == GROUPS
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"(?m)^profile: .*", f"profile: {profile}", (ROOT / "params.yaml").read_text()))
    loaded = params.load(path)
    assert loaded.profile == profile
    for group, changes in PARAMS["profiles"][profile].items():
        assert_contains(getattr(loaded, group).to_dict(), changes)


def assert_contains(whole: dict, part: dict) -> None:
    for key, value in part.items():
        assert_contains(whole[key], value) if isinstance(value, dict) else pytest.fail(key) if whole[
            key
        ] != value else None


def test_the_document_s_defaults(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"(?m)^profile: .*", "profile: defaults", (ROOT / "params.yaml").read_text()))
    loaded = params.load(path)
    assert (loaded.env.level, loaded.env.action_repeat) == ("1-1", 4)
    assert loaded.collect.steps == 10_000
    model = loaded.model
    assert (model.deter, model.stoch, model.classes, model.hidden, model.depth, model.units) == (
        512,
        32,
        32,
        512,
        32,
        512,
    )
    assert (model.unimix_ratio, model.initial) == (0.01, "learned")
    losses = loaded.losses
    assert (losses.free_nats, losses.dyn_scale, losses.rep_scale) == (0.6, 0.5, 0.1)
    behavior = loaded.behavior
    assert (behavior.imag_horizon, behavior.imag_gradient, behavior.entropy) == (15, "reinforce", 0.001)
    assert (behavior.discount, behavior.discount_lambda) == (0.997, 0.95)
    assert (behavior.slow_target, behavior.slow_target_update, behavior.slow_target_fraction) == (True, 1, 0.02)
    optimizers = loaded.optimizers
    assert (optimizers.model.lr, optimizers.actor.lr, optimizers.critic.lr) == (1e-4, 3e-5, 3e-5)
    assert {optimizers.model.grad_clip, optimizers.actor.grad_clip, optimizers.critic.grad_clip} == {100.0}
    train = loaded.train
    assert (train.steps, train.batch_size, train.batch_length, train.train_ratio) == (400_000, 16, 64, 512)
    assert (train.eval_every, train.eval_episodes) == (10_000, 10)


def test_settings_have_no_second_source_of_defaults():
    kinds = [kind for module in (config, params) for _, kind in inspect.getmembers(module, dataclasses.is_dataclass)]
    assert len(set(kinds)) > 10
    for kind in kinds:
        for field in dataclasses.fields(kind):
            assert field.default is field.default_factory is dataclasses.MISSING, f"{kind.__name__}.{field.name}"


def test_the_lock_file_pins_hashes_and_names_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    assert "--hash=sha256:" in lock
    assert not re.search(r"https?://|--(extra-)?index-url", lock)
