"""`mario deploy`: work pools and prefect.yaml's deployments on the Prefect server, as often as you like."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.errors import TryAgain, UserError

FILE = Path("prefect.yaml")
POOLS = {"mario-process": "process", "mario-docker": "docker"}


def deploy() -> int:
    """Returns the exit code of `prefect deploy`.

    Raises:
        UserError: no server is named, or this is not the repository's root
        TryAgain: the server does not answer
    """
    if not FILE.exists():
        raise UserError(f"{FILE}: not found; run from the repository's root")
    server = api()
    existing = pools(server)
    for name, kind in POOLS.items():
        if name not in existing and (code := _prefect("work-pool", "create", name, "--type", kind)):
            return code
    if code := _prefect("--no-prompt", "deploy", "--all"):
        return code
    print(f"\nthe deployments are at {server.removesuffix('/api')}; a worker runs them:")
    print(f"  prefect worker start --pool {next(iter(POOLS))}")
    return 0


def api() -> str:
    """The server's address.

    Raises:
        UserError: no server is named
        TryAgain: it does not answer
    """
    server = os.environ.get("PREFECT_API_URL") or _of_profile()
    if not server:
        remedy = "prefect server start, then export PREFECT_API_URL=http://127.0.0.1:4200/api"
        raise UserError(f"PREFECT_API_URL: no Prefect server is named; {remedy}")
    _ask(server, "work_pools/filter")
    return server


def _of_profile() -> str:
    """As `prefect config set PREFECT_API_URL` keeps it. Prefect's own reading of it takes two seconds."""
    import tomllib

    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text())
        return profiles["profiles"][profiles["active"]].get("PREFECT_API_URL", "")
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return ""


def _ask(server: str, what: str) -> list[dict]:
    import requests
    from urllib3.util import Retry

    # 503 is how Prefect says that its database is locked; its own client asks again, too.
    busy = Retry(
        total=None, connect=0, read=0, status=4, backoff_factor=1, status_forcelist=[503], allowed_methods=None
    )
    authorization = os.environ.get("PREFECT_API_AUTH_STRING", "")
    user, _, password = authorization.partition(":")
    try:
        with requests.Session() as session:
            session.mount(server, requests.adapters.HTTPAdapter(max_retries=busy))
            answer = session.post(
                f"{server}/{what}", json={}, timeout=10, auth=(user, password) if authorization else None
            )
    except requests.exceptions.RetryError:
        raise TryAgain(f"{server}: the Prefect server is too busy to answer (503); try again in a minute") from None
    except requests.RequestException:
        raise TryAgain(f"{server}: no Prefect server answers; start it: prefect server start") from None
    if answer.status_code in (401, 403):
        raise UserError(f"{server}: the Prefect server wants a password; set PREFECT_API_AUTH_STRING=USER:PASSWORD")
    if not answer.ok:
        raise UserError(
            f"{server}: does not answer as a Prefect server does ({answer.status_code}); correct PREFECT_API_URL"
        )
    return answer.json()


def workers(server: str, pool: str) -> int:
    """How many of that pool are online."""
    return sum(worker.get("status") == "ONLINE" for worker in _ask(server, f"work_pools/{pool}/workers/filter"))


def pools(server: str) -> set[str]:
    return {pool["name"] for pool in _ask(server, "work_pools/filter")}


def _prefect(*arguments: str) -> int:
    env = os.environ | {"PWD": str(Path.cwd()), "MARIO_USER": f"{os.getuid()}:{os.getgid()}"}
    return subprocess.run([sys.executable, "-m", "prefect", *arguments], env=env).returncode
