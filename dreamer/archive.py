"""Moments of earlier episodes from which new ones may begin: return there, then explore (Ecoffet et al., Nature 2021).

Where episodes end early, nearly all of them are about the first screens. Begun at places drawn evenly from all that any
episode has reached, they are about the whole level, long before an agent can play through it. Begun shortly before the
place where an agent has lately failed, and cut off once they have left it behind, they are about what it has to learn
next.
"""

import bisect
import copy
import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import ArchiveConfig

_FAILURES = 16  # the latest, which are practised
_RUN_UP = 8  # places: practice begins at most so many before a failure
_BEYOND = 8  # places: practice ends so many after it
_SURVIVED = 16  # decisions that an episode must have lived on: from a moment closer to its end, hardly anyone would


class Archive:
    """Where episodes have been, by place: the last few ways to get there, as the environment's `state_dict` tells them.

    A place is a stretch of `config.cell` units of `info["best_x"]`.
    """

    def __init__(self, config: ArchiveConfig):
        self.config = config
        self.places: dict[int, list[dict[str, Any]]] = {}  # options of `reset`, the newest last
        self.failures: deque[int] = deque(maxlen=_FAILURES)  # places
        self._entered: dict[int, list[tuple[int, int]]] = {}  # by environment: decisions so far, place

    def draw(self, seed: int) -> dict[str, Any]:
        """Options of `reset` for an episode: with probability `share` a place and a way there.

        With probability `practice` the place is one of the last ones up to a failure, else any, each equally likely.
        The options of such an episode also have `until`, the best x at which it has `passed`.
        """
        rng = np.random.default_rng(seed)
        if rng.random() >= self.config.share or not self.places:
            return {}
        places, end = sorted(self.places), {}
        if rng.random() < self.config.practice and self.failures:
            failure = self.failures[rng.integers(len(self.failures))]
            to = bisect.bisect_right(places, failure)
            places = places[max(to - _RUN_UP, 0) : to] or places[:1]
            end = {"until": (max(failure, places[-1]) + _BEYOND) * self.config.cell}
        ways = self.places[places[rng.integers(len(places))]]
        return {**ways[rng.integers(len(ways))], **end}

    @staticmethod
    def passed(options: dict[str, Any], info: dict[str, Any]) -> bool:
        """Whether an episode that practises has left behind what it was to practise, and may end."""
        return info["best_x"] >= options.get("until", math.inf)

    def fail(self, info: dict[str, Any]) -> None:
        """An episode from the start has ended and not cleared the level; `info` is the environment's."""
        self.failures.append(info["best_x"] // self.config.cell)

    def see(self, env: int, first: bool, info: dict[str, Any], moment: Callable[[], dict[str, Any]]) -> None:
        """One step of an environment's episode.

        Args:
            env: its number
            first: whether an episode begins
            info: the environment's, with `decisions` and `best_x`
            moment: its `state_dict`, called when needed
        """
        now, place = info["decisions"], info["best_x"] // self.config.cell
        entered = self._entered.setdefault(env, [])
        if first:
            entered[:] = [(now, place)]  # no news: the episode was put there
        elif place > entered[-1][1]:
            entered.append((now, place))
        while len(entered) > 1 and now - entered[1][0] >= _SURVIVED:
            del entered[0]
            then, place = entered[0]
            way = moment()
            ways = self.places.setdefault(place, [])
            ways.append({**way, "actions": way["actions"][:then]})
            del ways[: -self.config.kept]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.places, separators=(",", ":")) + "\n")

    def load(self, path: Path) -> None:
        self.places = {int(place): ways for place, ways in json.loads(path.read_text()).items()}

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy({"places": self.places, "failures": list(self.failures), "entered": self._entered})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.places, self._entered = copy.deepcopy(state["places"]), copy.deepcopy(state["entered"])
        self.failures = deque(state["failures"], maxlen=_FAILURES)
