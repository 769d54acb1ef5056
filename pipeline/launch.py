"""`python -m pipeline.launch STAGE`, the command of every stage in dvc.yaml: runs it where MARIO_RUNNER says."""

import ctypes
import os
import signal
import sys
from pathlib import Path

RUNNERS = ("process", "docker")
PIPELINE_KEY = "MARIO_PIPELINE_KEY"  # the same for all stages of one run of the pipeline
SILENT = {  # nothing here phones home; each of these tools reads a switch of its own
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
    "DVC_STUDIO_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = os.getppid()
    if sys.platform == "linux":
        # A stage whose dvc was killed gets SIGTERM, saves its progress and ends, rather than run on unseen.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    from pipeline import graph

    try:
        stages = graph.load()
    except graph.GraphError as error:
        sys.exit(f"error: {error}")
    plays = sys.argv[1:2] == ["play"]  # no stage, but runs where stages do
    if not plays and (len(sys.argv) != 2 or sys.argv[1] not in stages):
        sys.exit(f"error: unknown stage {' '.join(sys.argv[1:]) or '(none given)'}; stages: {', '.join(stages)}")
    runner = os.environ.get("MARIO_RUNNER", "process")
    if runner not in RUNNERS:
        sys.exit(f"error: MARIO_RUNNER: unknown runner {runner!r}; known: {', '.join(RUNNERS)}")
    os.environ.update(SILENT)
    os.environ.setdefault(PIPELINE_KEY, pipeline_key())
    if os.getppid() != parent:  # it died before the signal was arranged
        sys.exit(128 + signal.SIGTERM)
    if runner == "docker":
        sys.exit(in_container(sys.argv[1:], plays or graph.uses_gpu(sys.argv[1])))
    os.execv(sys.executable, [sys.executable, "-m", "stages", *sys.argv[1:]])


def in_container(command: list[str], gpu: bool) -> int | str:
    """Exit code of `python -m stages *command` in a container; where that cannot be, tells why in one line."""
    from pipeline import containers
    from pipeline.errors import UserError

    try:
        return containers.run(command, gpu)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def pipeline_key() -> str:
    """Identifies the dvc process above this one, or this process where there is none."""
    import psutil

    process = psutil.Process()
    above = next((one for one in process.parents() if _is_dvc(one)), process)
    return f"{above.pid}-{above.create_time():.2f}"


def _is_dvc(process) -> bool:
    import psutil

    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    if command and Path(command[0]).name.startswith("python"):
        command = command[1:]
    return command[:2] == ["-m", "dvc"] or (bool(command) and Path(command[0]).name == "dvc")


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        remedy = "run make setup, or put the environment that has dvc first on PATH"
        sys.exit(f"error: {sys.executable} has no module {error.name}; {remedy}")
