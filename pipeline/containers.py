"""`python -m stages` in a container of our image: this directory at its own path, the caller's user, the host's net.

The container lives no longer than the process that calls `run`, unless that one is killed with -9: then the next call
ends it.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import engine, revision, settings
from pipeline.errors import TryAgain, UserError

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

PASSED = ("MARIO_", "DVC_", "MLFLOW_", "OMP_", "MKL_", "GOMP_", "PYTORCH_", "CUDA_", "AWS_", "COLUMNS", "TZ")
CACHE = Path(".mario/cache")  # what a stage compiles once: C kernels, the index of fonts


def run(command: Sequence[str], gpu: bool) -> int:
    """Runs `python -m stages *command` to its end and returns its exit code. Its output appears here as it comes.

    The first SIGINT or SIGTERM is passed on, so that the stage saves its work; `runner.stop_seconds` later it is
    killed.

    Raises:
        TryAgain: there is no engine, or it went away
        UserError: it lacks permission, image, GPU or memory; names the remedy
    """
    runner = settings.load()
    with _signals() as came, engine.connect() as client:
        for name in engine.reap(client, runner.stop_seconds):
            print(f"ended the container of {name}, whose launcher was killed", file=sys.stderr, flush=True)
        image = engine.image(client)
        with _container(client, **_arguments(image, command, runner, gpu)) as container:
            if came:
                return 128 + came[0]
            output = _attach(container)
            container.start()
            _wait(container, output, came, runner.stop_seconds)
            return _exit_code(container, command[0], runner, came)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came so far."""
    came: list[int] = []
    before = {one: signal.signal(one, lambda signum, _: came.append(signum)) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _container(client: "docker.DockerClient", **arguments: Any) -> Iterator["Container"]:
    """Created, and in the end removed whatever happened."""
    from docker.errors import DockerException

    container = client.containers.create(**arguments)
    try:
        yield container
    finally:
        with contextlib.suppress(DockerException, OSError):
            container.remove(force=True)


def _arguments(image: Any, command: Sequence[str], runner: settings.Runner, gpu: bool) -> dict[str, Any]:
    from docker.types import DeviceRequest

    (Path.cwd() / CACHE).mkdir(parents=True, exist_ok=True)
    gpus = {"auto": -1 if _has_gpu() else 0, "all": -1, "none": 0}.get(runner.gpus, runner.gpus) if gpu else 0
    return {
        "image": image.id,
        "command": ["python", "-m", "stages", *command],
        "name": f"mario-{command[0]}-{os.getpid()}-{time.time_ns() % 10**6}",
        "labels": {
            engine.REPOSITORY_LABEL: str(Path.cwd()),
            engine.CALLER_LABEL: engine.caller(),
            engine.COMMAND_LABEL: command[0],
        },
        "environment": _environment(image),
        "mounts": _mounts(),
        "working_dir": str(Path.cwd()),
        "user": f"{os.getuid()}:{os.getgid()}",
        "group_add": os.getgroups(),
        "network_mode": "host",
        "init": True,  # else a stage would be process 1, which ignores signals that it does not handle
        "security_opt": ["no-new-privileges"],
        "shm_size": runner.shared_memory,
        "device_requests": [DeviceRequest(count=gpus, capabilities=[["gpu"]])] if gpus else None,
        **({"mem_limit": runner.memory, "memswap_limit": runner.memory} if runner.memory else {}),
    }


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def _environment(image: Any) -> dict[str, str]:
    values = {key: value for key, value in os.environ.items() if key.startswith(PASSED)}
    values |= {"HOME": "/tmp", "XDG_CACHE_HOME": str(Path.cwd() / CACHE), "MARIO_IMAGE_DIGEST": engine.digest(image)}
    if state := revision.state():
        values |= {"MARIO_GIT_COMMIT": state[0], "MARIO_GIT_DIRTY": str(state[1]).lower()}
    return values


def _mounts() -> list[Any]:
    """This directory; and where the tracking database is, should that be elsewhere."""
    from docker.types import Mount

    places = {Path.cwd()}
    scheme, _, rest = os.environ.get("MLFLOW_TRACKING_URI", "").strip().partition(":///")
    if scheme == "sqlite" and not (folder := Path(rest).absolute().parent).is_relative_to(Path.cwd()):
        places.add(folder)
    return [Mount(str(place), str(place), type="bind") for place in places]


def _attach(container: "Container") -> threading.Thread:
    """Passes both streams on as they come, progress bars included."""
    stream = container.attach(stream=True, demux=True)

    def work() -> None:
        with contextlib.suppress(OSError):  # the engine went away
            for chunks in stream:
                for chunk, target in zip(chunks, (sys.stdout, sys.stderr), strict=True):
                    with contextlib.suppress(OSError):  # nobody reads any more: the stage goes on all the same
                        if chunk:
                            target.buffer.write(chunk)
                            target.flush()

    thread = threading.Thread(target=work, name="output", daemon=True)
    thread.start()
    return thread


def _wait(container: "Container", output: threading.Thread, came: list[int], stop_seconds: float) -> None:
    from docker.errors import APIError

    passed_on, end = 0, None
    while output.is_alive():
        output.join(0.1)
        with contextlib.suppress(APIError):  # it has just ended
            if end is not None and time.monotonic() > end:
                container.kill()
                end += 60
            while passed_on < len(came):
                container.kill(signal.Signals(came[passed_on]).name)
                passed_on += 1
                end = end or time.monotonic() + stop_seconds


def _exit_code(container: "Container", name: str, runner: settings.Runner, came: list[int]) -> int:
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        code = container.wait(timeout=30)["StatusCode"]
        container.reload()
    except (DockerException, RequestException):
        remedy = "start it and run again, it goes on from the last checkpoint"
        raise TryAgain(f"docker: the engine went away while {name} ran; {remedy}") from None
    if code == 128 + signal.SIGKILL and not came:
        if container.attrs["State"]["OOMKilled"]:
            limit = f"its limit of {runner.memory}" if runner.memory else "the machine's"
            remedy = "raise runner.memory in params.yaml, or choose a smaller batch"
            raise UserError(f"{name}: killed for want of memory, beyond {limit}; {remedy}")
        raise UserError(
            f"{name}: its container was killed from outside; run again, it goes on from the last checkpoint"
        )
    return code
