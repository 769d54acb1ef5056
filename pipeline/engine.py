"""The Docker engine: how to reach it, the image of the stages, containers left behind, errors in one line."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pipeline.errors import TryAgain, UserError

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container
    from docker.models.images import Image

IMAGE = os.environ.get("MARIO_IMAGE") or "mario-dreamer"
STAGES_LOCK = Path("docker/stages.lock")
LOCK_LABEL, REPOSITORY_LABEL, CALLER_LABEL, COMMAND_LABEL = (
    f"mario-dreamer.{name}" for name in ("lock", "repository", "caller", "command")
)


@contextmanager
def connect() -> Iterator["docker.DockerClient"]:
    """A client of the engine that the docker command talks to. What goes wrong within the block is told in one line.

    Raises:
        TryAgain: no engine answers, or it went away
        UserError: it refuses us, or it cannot do what was asked of it
    """
    import docker
    from docker.context import ContextAPI
    from docker.errors import APIError, DockerException
    from requests.exceptions import ConnectionError, Timeout

    client = None
    try:
        context = None if os.environ.get("DOCKER_HOST") else ContextAPI.get_current_context()
        client = docker.DockerClient(base_url=context.Host, timeout=120) if context else docker.from_env(timeout=120)
        yield client
    except APIError as error:
        raise UserError(explained(str(error.explanation or error))) from None
    except (DockerException, ConnectionError, Timeout) as error:
        if _caused_by(error, PermissionError):
            remedy = "join its group (sudo usermod -aG docker $USER, then log in anew), or MARIO_RUNNER=process"
            raise UserError(f"docker: no permission to use the engine; {remedy}") from None
        if _caused_by(error, OSError) or isinstance(error, Timeout):
            remedy = "start it (sudo systemctl start docker, or Docker Desktop), or MARIO_RUNNER=process"
            raise TryAgain(f"docker: no engine answers; {remedy}") from None
        raise UserError(f"docker: {' '.join(str(error).split())}") from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE):
            raise TryAgain(f"docker: the engine went away ({error.strerror}); start it and run again") from None
        raise
    finally:
        if client is not None:
            client.close()


def _caused_by(error: BaseException | None, kind: type[OSError]) -> bool:
    """requests and urllib3 wrap what happened, as causes and as arguments."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, kind) and not type(one).__module__.startswith("requests"):
            return True
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            waiting += [one.__cause__, one.__context__, *one.args]
    return False


def explained(message: str) -> str:
    """One line for what the engine says it cannot do."""
    message = " ".join(message.split())
    if "could not select device driver" in message or "nvidia-container" in message:
        remedy = "install the NVIDIA container toolkit on the host, or set runner.gpus: none in params.yaml"
        return f"docker: the engine has no NVIDIA runtime; {remedy}"
    if "no space left on device" in message:
        return (
            "docker: the disk is full; free some space (docker system df shows what Docker takes, docker image prune)"
        )
    if "bind source path does not exist" in message:
        return (
            f"docker: the engine does not see {Path.cwd()}; use the engine of this machine (docker context use default)"
        )
    return f"docker: {message}"


def image(client: "docker.DockerClient") -> "Image":
    """The image of the stages.

    Raises:
        UserError: it is not there, or made of other packages than the repository names
    """
    from docker.errors import ImageNotFound

    try:
        found = client.images.get(IMAGE)
    except ImageNotFound:
        raise UserError(f"docker: no image {IMAGE}; build it: mario image build") from None
    if found.labels.get(LOCK_LABEL) != lock_hash():
        raise UserError(f"docker: image {IMAGE} has other packages than {STAGES_LOCK}; rebuild it: mario image build")
    return found


def digest(found: "Image") -> str:
    """Its name with the digest by which a registry knows it, or else with the one by which this engine does."""
    return next(iter(found.attrs.get("RepoDigests") or []), f"{IMAGE.partition(':')[0]}@{found.id}")


def lock_hash(path: Path = STAGES_LOCK) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def caller() -> str:
    """This process, for a label: a process id alone means another one elsewhere, or later."""
    return f"{_pid_namespace()} {os.getpid()} {psutil.Process().create_time():.2f}"


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return os.uname().nodename


def _lives(label: str) -> bool:
    namespace, pid, started = label.split()
    if namespace != _pid_namespace():
        return True  # it cannot be known from here
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == started
    except psutil.Error:
        return False


def orphans(client: "docker.DockerClient") -> list["Container"]:
    """Containers of this repository whose caller was killed and could not end them."""
    labels = {"label": [f"{REPOSITORY_LABEL}={Path.cwd()}", CALLER_LABEL]}
    found = client.containers.list(all=True, filters=labels, ignore_removed=True)
    return [one for one in found if not _lives(one.labels[CALLER_LABEL])]


def reap(client: "docker.DockerClient", stop_seconds: float) -> list[str]:
    """Ends and removes orphans, with time to save their work first. Returns what they ran."""
    from docker.errors import NotFound

    ended = []
    for container in orphans(client):
        try:
            container.stop(timeout=round(stop_seconds))
            container.remove(force=True)
        except NotFound:  # another process was faster
            continue
        ended.append(container.labels.get(COMMAND_LABEL, container.name))
    return ended
