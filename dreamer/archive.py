"""Moments of earlier episodes from which new ones may begin: return there, then explore (Ecoffet et al., Nature 2021).

Where episodes end early, nearly all of them are about the first screens. Begun at places drawn evenly from all that any
episode has reached, they are about the whole level, long before an agent can play through it.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import ArchiveConfig

_SURVIVED = 16  # decisions that an episode must have lived on: from a moment closer to its end, hardly anyone would


class Archive:
    """Where episodes have been, by place: the last few ways to get there, as the environment's `state_dict` tells them.

    A place is a stretch of `config.cell` units of `info["best_x"]`.
    """

    def __init__(self, config: ArchiveConfig):
        self.config = config
        self.places: dict[int, list[dict[str, Any]]] = {}  # options of `reset`, the newest last
        self._entered: dict[int, list[tuple[int, int]]] = {}  # by environment: decisions so far, place

    def draw(self, seed: int) -> dict[str, Any]:
        """Options of `reset` for an episode: with probability `share` a place, each equally likely, and a way there."""
        rng = np.random.default_rng(seed)
        if rng.random() >= self.config.share or not self.places:
            return {}
        ways = self.places[sorted(self.places)[rng.integers(len(self.places))]]
        return dict(ways[rng.integers(len(ways))])

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
        return copy.deepcopy({"places": self.places, "entered": self._entered})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.places, self._entered = copy.deepcopy(state["places"]), copy.deepcopy(state["entered"])
