"""Promotion and the way back, with real agents that press one button, on a real MLflow server."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from agents import pressing
from clones import copy, run
from test_tracking import Server

from dreamer import checkpoint
from pipeline import models, promote
from pipeline.errors import UserError
from pipeline.registry import Registry, Term, standing
from stages import bundle, params, paths, tracking

mlflow = pytest.importorskip("mlflow")

NOOP, RIGHT, RUN = 0, 1, 3
pytestmark = pytest.mark.timeout(3600)  # many processes, each of which loads torch and MLflow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def tree(tmp_path_factory, server):
    """The repository with very short episodes; this process works in it."""
    tree = copy(tmp_path_factory.mktemp("tree"))
    path = tree / "params.yaml"
    short = "debug:\n    env: {time_limit: 8, noop_max: 4}"
    path.write_text(path.read_text().replace("debug:\n    env: {time_limit: 400}", short))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        patch.setattr(paths, "ROOT", tree)
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        patch.setenv("OMP_NUM_THREADS", "1")
        for key in ("MARIO_PIPELINE_KEY", "DVC_STAGE", "DVC_EXP_NAME"):
            patch.delenv(key, raising=False)
        yield tree


@pytest.fixture(scope="module")
def register(tree):
    """Registers an agent that presses a button; gives its version."""
    settings = params.load(tree / "params.yaml")

    def registered(button: int, strength: float = 20.0) -> str:
        torch.manual_seed(0)
        state = {**checkpoint.agent_state(pressing(button, strength)), "frames": 400, "score": 1.0}
        path = bundle.write(tree / f"bundles/{button}-{strength}", state, settings.env.to_dict())
        with tracking.run("evaluate", settings) as record:
            return record.log_model(path, settings, {"sampled": {"clear_rate": 0.0}})["version"]

    return registered


@pytest.fixture(scope="module")
def story(tree, register):
    """First a walker is promoted, then a runner; then one that stands still is not, and the champions are listed."""
    walker, runner, sleeper = register(RIGHT), register(RUN), register(NOOP)
    told = {"walker": walker, "runner": runner, "sleeper": sleeper, "codes": [promote.promote(walker)]}
    told["first"] = json.loads(promote.VERDICT.read_text())
    told["codes"].append(promote.promote(runner))
    told["second"] = json.loads(promote.VERDICT.read_text())
    told["planted"] = run(tree, "mario", "promote", sleeper, env=server_of(os.environ), timeout=1800)
    told["third"] = json.loads(promote.VERDICT.read_text())
    return told


def server_of(environment) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": environment["MLFLOW_TRACKING_URI"]}


def appointed(version: str) -> str:
    """Champion without being judged."""
    found = Registry()
    assert found.appoint(found.version(version), found.terms()[-1].number, "forced", "a test", "")
    return version


def champion() -> str:
    """As MLflow's alias says, which is what all others go by."""
    return str(Registry().client.get_model_version_by_alias("mario-dreamer", "champion").version)


def test_the_first_is_promoted_by_its_floors_and_the_better_by_the_test(story):
    assert story["codes"] == [0, 0]
    first, second = story["first"], story["second"]
    assert (first["status"], first["champion"], first["test"]) == ("PASS", None, None)
    assert (second["status"], second["champion"], second["version"]) == ("PASS", story["walker"], story["runner"])
    test = second["test"]
    assert test["name"] == "bootstrap" and 0 < test["low"] < test["difference"]
    assert second["results"]["challenger"]["episodes"] == second["results"]["champion"]["episodes"] == 100
    means = [second["results"][who]["return_mean"] for who in ("challenger", "champion")]
    assert means[0] - means[1] == pytest.approx(test["difference"])


def test_a_planted_bad_model_exits_1_and_changes_nothing(story):
    done, verdict = story["planted"], story["third"]
    assert done.returncode == 1, done.stderr
    assert "200/200" in done.stderr  # the progress bar
    assert re.search(r"FAIL: neither clears the level; return", done.stdout)
    assert f"version {story['sleeper']} is not promoted" in done.stdout
    assert verdict["status"] == "FAIL" and verdict["promoted"] is False
    assert verdict["reasons"][0].startswith("mean return") and "promote.return_min" in verdict["reasons"][0]
    assert [term.version for term in Registry().terms()][:2] == [story["walker"], story["runner"]]


def test_a_verdict_is_with_the_version_and_in_the_log(story):
    found = Registry()
    for name, status in (("walker", "PASS"), ("runner", "PASS"), ("sleeper", "FAIL")):
        tags = found.version(story[name]).tags
        assert tags["gate.verdict"] == status and tags["gate.reasons"] and tags["gate.at"]
        stored = found.client.get_run(tags["gate.run"])
        assert stored.data.tags["verdict"] == status and stored.info.status == "FINISHED"
        path = mlflow.artifacts.download_artifacts(
            run_id=tags["gate.run"], artifact_path="verdict.json", tracking_uri=found.uri
        )
        verdict = json.loads(Path(path).read_text())
        assert len(verdict["results"]["challenger"]["episodes"]) == 100
    first, second = found.terms()[:2]
    assert (first.kind, second.kind) == ("promotion", "promotion")
    assert "no champion to compare with" in first.reason and "paired bootstrap" in second.reason


def test_what_cannot_gain_anything_is_refused(story, register, capfd):
    with pytest.raises(UserError, match=f"version {champion()} is the champion already"):
        promote.promote("champion")
    twin = register(RUN)
    assert promote.promote(twin) == 1
    assert "the champion's weights, bit by bit" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"no version or alias '99'; it has 1, 2.*champion \(2\)"):
        promote.promote("99")
    with pytest.raises(UserError, match="--force needs --reason"):
        promote.promote(story["sleeper"], force=True)


def test_automatic_promotion_is_off_by_default(story, capsys):
    before = Registry().terms()
    assert promote.promote(story["sleeper"], automatic=True) == 0
    assert "promote.automatic is false" in capsys.readouterr().out
    assert Registry().terms() == before


def test_force_and_the_way_back_and_who_was_champion_when(story, capsys):
    walker, runner, sleeper = story["walker"], story["runner"], story["sleeper"]
    assert promote.promote(sleeper, reason="to see it sleep", force=True) == 0
    assert champion() == sleeper
    assert promote.rollback() == 0
    assert champion() == runner
    assert promote.rollback(reason="walking is safer") == 0
    assert champion() == walker
    with pytest.raises(UserError, match="is the first champion"):
        promote.rollback()
    assert promote.rollback(runner) == 0
    assert champion() == runner
    with pytest.raises(UserError, match="was no champion before"):
        promote.rollback("99")
    kinds = [(term.version, term.kind) for term in Registry().terms()]
    assert kinds == [
        (walker, "promotion"),
        (runner, "promotion"),
        (sleeper, "forced"),
        (runner, "rollback"),
        (walker, "rollback"),
        (runner, "rollback"),
    ]
    told = models.history(as_json=False)
    assert re.search(rf"version {sleeper} +forced by \S+: to see it sleep", told)
    assert re.search(rf"version {walker} +rollback by \S+: walking is safer", told)
    assert re.search(rf"version {sleeper} +FAIL against version {runner}", told)
    listed = {row["version"]: row for row in json.loads(models.listed(as_json=True))}
    assert listed[runner]["aliases"] == ["champion"] and listed[walker]["aliases"] == []
    assert listed[sleeper]["gate"] == "FAIL"
    lines = models.listed(as_json=False).splitlines()
    assert len(lines) == 1 + len(listed) and lines[int(runner)].endswith("champion")


def test_an_alias_that_somebody_moved_is_told_and_put_back(story):
    found, here = Registry(), champion()
    found.client.set_registered_model_alias("mario-dreamer", "champion", story["sleeper"])
    assert "by hand" in models.listed(as_json=False)
    assert str(found.version("champion").version) == here
    found.settle()
    assert champion() == here
    assert "by hand" not in models.listed(as_json=False)


def test_a_tampered_artifact_is_an_error_that_is_logged_and_nobody_s_champion(tree, server, story, register):
    victim, here = register(RUN, 10.0), champion()
    source = Registry().version(victim).source.rpartition("/")[2]
    (weights,) = server.folder.glob(f"**/{source}/**/weights.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = run(
        tree, "mario", "promote", victim, "--force", "--reason", "I want it", env=server_of(os.environ), timeout=1800
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(rf"error: version {victim} is not promoted: .*not those that were registered.*", last)
    assert Registry().version(victim).tags["gate.verdict"] == "ERROR"
    assert champion() == here
    with pytest.raises(tracking.BundleError, match="not those that were registered"):
        tracking.fetch(victim)


def test_an_earlier_champion_that_was_tampered_with_is_not_gone_back_to(server, story, register):
    here = champion()
    for strength in (8.0, 6.0):
        last = appointed(register(RUN, strength))
    before = Registry().terms()[-2].version
    source = Registry().version(before).source.rpartition("/")[2]
    (config,) = server.folder.glob(f"**/{source}/**/config.json")
    config.write_text(config.read_text().replace('"frames": 400', '"frames": 401'))
    with pytest.raises(UserError, match=f"not rolled back to version {before}: .*not those that were registered"):
        promote.rollback()
    assert champion() == last
    assert promote.rollback(here) == 0
    assert champion() == here


def test_of_two_promotions_at_once_one_wins(tree, story, register):
    """Each is compared with the same champion, and each is better; the second is told that it came too late."""
    appointed(story["sleeper"])  # to be beaten
    versions = [register(RIGHT, strength) for strength in (12.0, 13.0)]
    before = Registry().terms()
    command = [sys.executable, "-m", "pipeline.cli", "promote"]
    both = [
        subprocess.Popen([*command, version], cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for version in versions
    ]
    told = [process.communicate() for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], told
    winner, loser = (versions[codes.index(code)] for code in (0, 1))
    added = Registry().terms()[len(before) :]
    assert [term.version for term in added] == [winner]
    assert champion() == winner
    error = told[codes.index(1)][1].strip().splitlines()[-1]
    assert (
        re.fullmatch(
            rf"error: version {loser} is not promoted: version {winner} became champion while .* mario promote {loser}",
            error,
        )
        or error == f"error: version {winner} is the champion already"
    )
    assert Registry().version(loser).tags["gate.verdict"] == "ERROR"


def test_the_log_has_one_winner_however_many_write_at_once(story):
    """Real processes that append after the same entry, some rounds; all come to one result."""
    code = (
        "import sys\nfrom pipeline.registry import Registry\nfound = Registry()\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    term = found.appoint(found.version(sys.argv[1]), int(line), 'forced', 'race', '')\n"
        "    print(term is not None, flush=True)\n"
    )
    versions = [story["walker"], story["runner"], story["sleeper"]]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, version], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for version in versions
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for _ in range(5):
        after = Registry().terms()[-1].number
        for racer in racers:
            racer.stdin.write(f"{after}\n")
            racer.stdin.flush()
        with ThreadPoolExecutor() as pool:
            won = list(pool.map(lambda racer: racer.stdout.readline().strip(), racers))
        assert sorted(won) == ["False", "False", "True"]
        last = Registry().terms()[-1]
        assert last.version == versions[won.index("True")]
        assert champion() == last.version
    for racer in racers:
        racer.stdin.close()
        assert racer.wait() == 0


def term(number: int, version: str, kind: str = "promotion") -> Term:
    return Term(number, version, kind, "", "", "", "")


def test_who_can_be_gone_back_to():
    log = [term(1, "1"), term(2, "2"), term(3, "3")]
    assert [one.version for one in standing(log)] == ["1", "2", "3"]
    log += [term(4, "2", "rollback")]
    assert [one.version for one in standing(log)] == ["1", "2"]
    log += [term(5, "4")]
    assert [one.version for one in standing(log)] == ["1", "2", "4"]
    log += [term(6, "1", "rollback")]
    assert [one.version for one in standing(log)] == ["1"]


def test_without_a_store_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"mlflow\.db: nothing is registered here yet; train a model"):
        Registry()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=http://127\.0\.0\.1:9: cannot be used .*start it"):
        Registry()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/empty.db")
    assert models.listed(as_json=False).startswith("no model is registered yet")
    assert models.history(as_json=False).startswith("nobody was promoted yet")
    with pytest.raises(UserError, match="no model is registered yet; train one"):
        Registry().version("challenger")
