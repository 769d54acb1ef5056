"""`mario doctor`: what this machine has of what the pipeline needs, and what to do about the rest."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path

from pipeline import deployments, engine, settings
from pipeline.errors import UserError

GOOD, NOTE, BAD = "ok", "note", "BAD"
DISK_GB = 15  # image, packages and a few versions of replay and checkpoints
Finding = tuple[str, str, str]  # how it is, what, the details with the remedy


def examine() -> int:
    """Prints a line for each finding. Returns 1 if something is BAD, which the pipeline cannot do without."""
    found: list[Finding] = []
    for examination in (python, disk, parameters, compiler, git, docker, gpu, remote, mlflow, prefect):
        for finding in attempt(examination):
            print("{:<5} {:<12} {}".format(*finding), flush=True)
            found.append(finding)
    return int(any(how == BAD for how, _, _ in found))


def attempt(examination: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a user can cure is a finding, too; all that is examined here can be done without but the first three."""
    try:
        yield from examination()
    except UserError as error:
        yield BAD if examination in (python, disk, parameters) else NOTE, examination.__name__, str(error)


def python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (Path.cwd() / ".venv").exists() or Path(sys.prefix).resolve() != (Path.cwd() / ".venv").resolve():
        yield NOTE, "Python", f"{version} in {sys.prefix}, not in this directory's .venv; make setup makes one"
    else:
        yield GOOD, "Python", f"{version} in .venv"


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / 1e9
    if free < 1:
        yield BAD, "disk", f"{free:.1f} GB free; dvc gc --workspace drops old versions"
    elif free < DISK_GB:
        yield NOTE, "disk", f"{free:.0f} GB free; the image and a long run want {DISK_GB}"
    else:
        yield GOOD, "disk", f"{free:.0f} GB free"


def parameters() -> Iterator[Finding]:
    runner = settings.load()
    memory = runner.memory or "no limit"
    yield GOOD, "runner", f"{os.environ.get('MARIO_RUNNER', 'process')}; memory {memory}, GPUs {runner.gpus}"


def compiler() -> Iterator[Finding]:
    if found := shutil.which(os.environ.get("CC", "cc")):
        yield GOOD, "compiler", found
    else:
        yield NOTE, "compiler", "no C compiler, which compute.compile: true needs on a CPU (profile cpu); install gcc"


def git() -> Iterator[Finding]:
    if not shutil.which("git") or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True).returncode:
        yield (
            NOTE,
            "git",
            "no commit here: runs do not say of which code, and there are no experiments; git init, git commit",
        )
    else:
        yield GOOD, "git", "every run names its commit"


def docker() -> Iterator[Finding]:
    with engine.connect() as client:
        yield GOOD, "docker", f"engine {client.version()['Version']}"
        image = engine.image(client)
        yield GOOD, "image", f"{engine.digest(image)[:60]}, {image.attrs['Size'] / 1e9:.1f} GB"
        if left := engine.orphans(client):
            yield (
                NOTE,
                "containers",
                f"{len(left)} left behind by killed launchers; the next stage in a container ends them",
            )


def gpu() -> Iterator[Finding]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True) if shutil.which(command[0]) else None
    if asked is None or asked.returncode:
        yield NOTE, "GPU", "no NVIDIA GPU here: the profiles debug and cpu are for that"
        return
    yield GOOD, "GPU", "; ".join(asked.stdout.strip().splitlines())
    with engine.connect() as client:
        if "nvidia" not in client.info().get("Runtimes", {}) and not shutil.which("nvidia-container-runtime-hook"):
            yield NOTE, "GPU", engine.explained("could not select device driver")


def remote() -> Iterator[Finding]:
    config = ConfigParser()
    config.read([".dvc/config", ".dvc/config.local"])
    name = config.get("core", "remote", fallback=None)
    url = next((config[key].get("url") for key in config.sections() if name and f'"{name}"' in key), None)
    if url is None:
        yield (
            NOTE,
            "DVC remote",
            "none: results stay on this machine; dvc remote add --local --default storage DIRECTORY",
        )
    elif "://" not in url and not (Path(".dvc") / url).exists():
        yield NOTE, "DVC remote", f"{name}: {url} does not exist yet; dvc push makes it"
    else:
        yield GOOD, "DVC remote", f"{name}: {url}"


def mlflow() -> Iterator[Finding]:
    import requests

    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip().rstrip("/")
    if not uri.startswith("http"):
        database = Path("mlflow.db")
        size = f"{database.stat().st_size / 1e6:.0f} MB" if database.exists() else "made by the first stage"
        yield GOOD, "MLflow", f"{uri or 'sqlite:///mlflow.db'} ({size}); mario ui shows it"
        return
    try:
        code = requests.get(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1", timeout=10).status_code
    except requests.RequestException:
        yield BAD, "MLflow", f"{uri}: no server answers; start it (mlflow server), or unset MLFLOW_TRACKING_URI"
        return
    if code == 403:
        yield BAD, "MLflow", f"{uri}: the server refuses this host name; start it with --allowed-hosts naming it"
    elif code != 200:
        yield BAD, "MLflow", f"{uri}: answers {code}, not as an MLflow server does; correct MLFLOW_TRACKING_URI"
    else:
        yield GOOD, "MLflow", uri


def prefect() -> Iterator[Finding]:
    server = deployments.api()
    yield GOOD, "Prefect", server
    pools = deployments.pools(server)
    if missing := [name for name in deployments.POOLS if name not in pools]:
        yield NOTE, "Prefect", f"no work pool {' or '.join(missing)}; mario deploy"
    working = {name: deployments.workers(server, name) for name in deployments.POOLS if name in pools}
    if working and not any(working.values()):
        yield (
            NOTE,
            "Prefect",
            f"no worker is online, so nothing is run; prefect worker start --pool {next(iter(working))}",
        )
