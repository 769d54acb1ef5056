"""Which models there are to pick from, and how one becomes an agent."""

from collections.abc import Callable
from pathlib import Path

from dreamer.agent import Agent
from dreamer.checkpoint import load_agent
from dreamer.config import ComputeConfig
from stages import tracking
from stages.address import TrackingError
from stages.paths import CHECKPOINTS


def loader(find: Callable[[str, None], Path], compute: ComputeConfig) -> Callable[[str], Agent]:
    """An agent by what `mario play --model` takes; `find` is that of `stages.play`."""
    return lambda name: load_agent(find(name, None), compute)


def known(given: str) -> list[dict[str, str]]:
    """Names for `loader`, each with what it is: the one that was asked for, the registry's, the checkpoints'.

    A registry that cannot be reached has none; why is told in its place, without a name.
    """
    try:
        registered = tracking.registered_models()
    except TrackingError as error:
        registered = [{"name": "", "about": str(error)}]
    files = [{"name": str(path), "about": "checkpoint"} for path in sorted(CHECKPOINTS.glob("*.pt"))]
    names = {each["name"] for each in registered + files}
    return ([] if given in names else [{"name": given, "about": "as started"}]) + registered + files
