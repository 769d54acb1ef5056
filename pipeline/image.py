"""`mario image build`: the image in which stages run, and that of the services, by BuildKit."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline import engine, revision
from pipeline.errors import UserError

DOCKERFILE, SERVICES_LOCK = Path("docker/Dockerfile"), Path("docker/services.lock")
SERVICES = f"{engine.IMAGE}-services"


def build(services: bool, base: str | None) -> int:
    """Builds the image, with packages as locked. Unchanged layers are taken from the engine's cache.

    Args:
        services: that of docker/compose.yaml and the Docker work pool instead of that of the stages
        base: image with Python 3.13 to start from, instead of BASE_IMAGE or the Dockerfile's

    Raises:
        UserError: no docker command or no engine; or the build failed, its words then stand above
    """
    for path in (DOCKERFILE, engine.STAGES_LOCK, SERVICES_LOCK):
        if not path.exists():
            raise UserError(f"{path}: not found; run from the repository's root")
    if not shutil.which("docker"):
        raise UserError("docker: no such command; install Docker with its buildx plugin")
    with engine.connect() as client:
        client.ping()
        started = time.monotonic()
        name = SERVICES if services else engine.IMAGE
        code = subprocess.run(
            [*_command(name, services, base), "."], env=os.environ | {"DOCKER_BUILDKIT": "1"}
        ).returncode
        if code:
            remedy = "the reason stands above (a base image that cannot be pulled: name another with --base)"
            raise UserError(f"docker: the build of {name} failed; {remedy}")
        built = client.images.get(name)
        size = built.attrs["Size"] / 1e9
        print(f"{name}: {size:.1f} GB in {time.monotonic() - started:.0f} s, {built.id}")
    return 0


def _command(name: str, services: bool, base: str | None) -> Iterator[str]:
    yield from ("docker", "build", "--file", str(DOCKERFILE), "--tag", name)
    yield from ("--target", "services" if services else "stages")
    commit, dirty = revision.state() or ("unknown", False)
    arguments = {
        "UV_VERSION": re.search(r"^UV_VERSION := (\S+)", Path("Makefile").read_text(), re.MULTILINE)[1],
        "COMMIT": commit + ("-dirty" if dirty else ""),
        "LOCK": engine.lock_hash(SERVICES_LOCK if services else engine.STAGES_LOCK),
    }
    if base := base or os.environ.get("BASE_IMAGE"):
        arguments["BASE_IMAGE"] = base
    for key, value in arguments.items():
        yield from ("--build-arg", f"{key}={value}")
    for key, source in _secrets():
        yield from ("--secret", f"id={key},{source}")


def _secrets() -> Iterator[tuple[str, str]]:
    """Where this machine gets its packages from, and whom it trusts for that; no layer of the image keeps it."""
    files = (os.environ.get("PIP_CONFIG_FILE"), "~/.config/pip/pip.conf", "~/.pip/pip.conf", "/etc/pip.conf")
    if found := next((path for name in files if name and (path := Path(name).expanduser()).is_file()), None):
        yield "pip.conf", f"src={found}"
    if variable := next((one for one in ("UV_DEFAULT_INDEX", "PIP_INDEX_URL") if os.environ.get(one)), None):
        yield "index", f"env={variable}"
    if (bundle := os.environ.get("SSL_CERT_FILE")) and Path(bundle).is_file():
        yield "ca", f"src={bundle}"
