"""`mario demo`: the whole pipeline with the debug profile, and then where to look."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from pipeline import graph, shipped
from pipeline.errors import UserError

PARAMS, LOCK, REPORT, EVALUATION = (
    Path("params.yaml"),
    Path("dvc.lock"),
    Path("reports/report.html"),
    Path("reports/evaluation.json"),
)
PROFILE = re.compile(r"^(profile:[ \t]*)([^\s#]+)", re.MULTILINE)


def run() -> int:
    """Returns DVC's exit code: 0, or not if a stage failed.

    Raises:
        UserError: params.yaml has no line `profile:`
        GraphError: this is not the repository's root
    """
    graph.load()
    choose_debug()
    shipped.enroll()
    before = LOCK.read_bytes() if LOCK.exists() else None
    code = dvc("--wait-for-lock", "repro")
    if code:
        return code
    if before is not None and LOCK.read_bytes() == before:
        print("\nNothing had to run again: the results are those of the present code, data and parameters.")
    print(f"\n{headline()}\n{where()}")
    return 0


def choose_debug() -> None:
    """Sets the profile in params.yaml to debug, and no other character of it."""
    text = PARAMS.read_text() if PARAMS.exists() else ""
    if not (found := PROFILE.search(text)):
        raise UserError(f"{PARAMS}: no line 'profile: NAME'; restore it (git checkout {PARAMS})")
    if found[2] != "debug":
        PARAMS.write_text(text[: found.start(2)] + "debug" + text[found.end(2) :])
        print(f"{PARAMS}: profile is debug now, it was {found[2]}")


def dvc(*arguments: str) -> int:
    """Runs DVC to its end and returns its exit code. Ctrl-C reaches it and the stage without our help."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.Popen([sys.executable, "-m", "dvc", *arguments], env=os.environ | {"PATH": path})
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def headline() -> str:
    """The evaluation in two lines."""
    evaluation = json.loads(EVALUATION.read_text())
    return "\n".join(
        f"{mode}: clear rate {of['clear_rate']:.0%} [{of['clear_rate_low']:.0%}, {of['clear_rate_high']:.0%}], "
        f"return {of['return_mean']:.0f} [{of['return_low']:.0f}, {of['return_high']:.0f}], "
        f"best x {of['best_x_max']} ({of['episodes']} episodes)"
        for mode in ("sampled", "greedy")
        for of in [evaluation[mode]]
    )


def where() -> str:
    tools = Path(sys.executable).parent
    if tools.is_relative_to(Path.cwd()):
        tools = tools.relative_to(Path.cwd())
    return (
        f"report       {REPORT}  {REPORT.resolve().as_uri()}\n"
        f"MLflow       {tools}/mario ui\n"
        f"TensorBoard  {tools}/tensorboard --logdir .mario/tensorboard\n"
        f"play         {tools}/mario play\n"
        f"champion     {tools}/mario play --model champion --web"
    )
