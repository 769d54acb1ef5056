"""`mario run`: the flow `pipeline` here and now, with its output on this terminal."""

import os
import sys
from collections.abc import Sequence

from pipeline import graph, settings

QUIET = {  # the flow's own lines go to the terminal instead of Prefect's
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def run(profile: str | None, overrides: Sequence[str], runner: str | None, minutes: float | None) -> int:
    """Returns 0 if all is up to date or time ran out, 1 if a stage failed, 130 if the run was cancelled.

    Raises:
        UserError: this is not the repository's root, or params.yaml is wrong
    """
    graph.load()
    settings.load()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("PREFECT_API_URL"):
        print("PREFECT_API_URL is not set: a temporary Prefect server starts, about 20 s", file=sys.stderr, flush=True)
    from pipeline import flow

    flow.echo = True
    state = flow.pipeline(profile, list(overrides), runner, minutes, return_state=True)
    print(
        f"{'error: ' if state.is_failed() or state.is_crashed() else ''}{state.name}: {state.message}", file=sys.stderr
    )
    return 0 if state.is_completed() else 130 if state.is_cancelled() else 1
