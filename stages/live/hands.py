"""A person's hands on the joypad, as one of the agent's seven actions."""

from collections.abc import Iterable

from dreamer.mario import ACTIONS
from stages.live.errors import LiveError

BUTTONS = ("left", "right", "A", "B")
NAMES = tuple(ACTIONS)


def action_of(buttons: Iterable[str]) -> int:
    """The action nearest to the buttons: to the left one can only walk, and B alone does nothing."""
    buttons = set(buttons)
    if "left" in buttons and "right" not in buttons:
        return NAMES.index("left")
    held = [name for name in ("right", "A", "B") if name in buttons]
    name = "+".join(held)
    return NAMES.index(name) if name in NAMES else NAMES.index("A" if "A" in held else "noop")


class Hands:
    """What is held, and what was tapped since the last decision: no tap between two decisions is lost."""

    def __init__(self):
        self.on = False  # the joypad, instead of the agent
        self.held: frozenset[str] = frozenset()
        self.latest: int | None = None  # action, since they took it
        self._tapped: set[str] = set()

    def take(self, on: bool) -> None:
        self.on, self.held, self.latest, self._tapped = on, frozenset(), None, set()

    def hold(self, buttons: Iterable[str]) -> None:
        """All that is held from now on.

        Raises:
            LiveError: there is no such button
        """
        held = frozenset(buttons)
        if unknown := sorted(held - set(BUTTONS)):
            raise LiveError(f"{unknown[0]}: no such button; there are {', '.join(BUTTONS)}")
        self._tapped |= held - self.held
        self.held = held

    def action(self) -> int:
        """For the next decision; forgets the taps."""
        buttons, self._tapped = self.held | self._tapped, set()
        self.latest = action_of(buttons)
        return self.latest
