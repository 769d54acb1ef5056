"""Are a registered version's files those that were registered? Not a stage; `mario rollback` asks."""

import sys

from stages import tracking
from stages.bundle import read_config


def main() -> None:
    for which in sys.argv[1:]:
        read_config(tracking.fetch(which, fresh=True))
