"""Which models there are to pick from, and how one becomes an agent."""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dreamer.config import ComputeConfig
from stages import tracking
from stages.address import TrackingError
from stages.paths import CHECKPOINTS

if TYPE_CHECKING:
    from dreamer.agent import Agent


def loader(find: Callable[[str, None], Path], compute: ComputeConfig) -> "Callable[[str], Agent]":
    """An agent by what `mario play --model` takes; `find` is that of `stages.play`."""
    from stages.agents import load_agent  # late: the process that lists models has no use for torch

    return lambda name: load_agent(find(name, None), compute)


async def known(given: str) -> list[dict[str, str]]:
    """Names for `loader`, each with what it is: the one that was asked for, the registry's, the checkpoints'.

    A registry that cannot be reached has none; why is told in its place, without a name.
    """
    registered = await _registered()
    files = [{"name": str(path), "about": "checkpoint"} for path in sorted(CHECKPOINTS.glob("*.pt"))]
    names = {each["name"] for each in registered + files}
    return ([] if given in names else [{"name": given, "about": "as started"}]) + registered + files


async def _registered() -> list[dict[str, str]]:
    """Asks in a process of its own: importing MLflow takes seconds, in which this one could not play."""
    command = (sys.executable, "-m", "stages.live.models")
    asking = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
    )
    try:
        answer, trouble = await asking.communicate()
    finally:
        if asking.returncode is None:
            asking.kill()
    if asking.returncode:
        last = (trouble.decode(errors="replace").strip() or "no reason given").splitlines()[-1]
        return [{"name": "", "about": f"registered models cannot be listed: {last}"}]
    return json.loads(answer)


def main() -> None:
    """Prints the registered models as JSON."""
    try:
        found = tracking.registered_models()
    except TrackingError as error:
        found = [{"name": "", "about": str(error)}]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
