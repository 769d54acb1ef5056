"""What a stage can say of itself while it runs: scalars, films, files, tags, and in the end a model."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stages import claims, outbox, paths
from stages.events import Events, NoEvents
from stages.outbox import Outbox, Record, notice
from stages.params import Params

MODEL = "mario-dreamer"
ALIAS = "challenger"
PATIENCE = 30.0  # seconds that the end of a stage waits for a store that is away


class Run:
    """A stage's record. `run_id`, `parent_run_id` and `uri`, the store's address, are None without MLflow."""

    run_id: str | None = None
    parent_run_id: str | None = None
    uri: str | None = None

    def __init__(self, tags: dict[str, str], events: Events | NoEvents):
        self._tags, self._events = tags, events

    def metrics(self, values: dict[str, float], frames: int) -> None:
        """Scalars at `frames` emulator frames. Queued: takes microseconds, and never raises for the store's sake."""
        values = {name: float(value) for name, value in values.items()}
        self._events.scalars(values, frames)

    def headline(self, values: dict[str, float], frames: int) -> None:
        """`metrics` which the pipeline's run shows, too."""
        self.metrics(values, frames)

    def video(self, name: str, images: Iterable[np.ndarray], frames: int, fps: int) -> None:
        """An animation of (H, W, 3) uint8 images as `videos/<name>/<frames>.gif`, and under Images in TensorBoard."""
        from stages import gif

        encoded = gif.encode(images, fps)
        self._events.animation(name, encoded, frames)
        self._keep_video(f"videos/{name}", f"{frames:09d}.gif", encoded)

    def _keep_video(self, folder: str, file: str, encoded: bytes) -> None:
        pass

    def artifact(self, path: Path, folder: str) -> None:
        """Copies a file, or what is in a directory, to `folder` of the run's artifacts; before the stage ends."""

    def tags(self, tags: dict[str, str]) -> None:
        """Adds tags to this run and the pipeline's."""
        self._tags.update(tags)

    def waiting(self) -> list[list]:
        """What the store has not taken yet, for a checkpoint: whoever is killed after it loses nothing of it."""
        return []

    def put_again(self, waiting: list[list]) -> None:
        """Queues what `waiting` gave once. What the store did take since, it takes again as the same."""

    def log_model(
        self, bundle: Path, params: Params, evaluation: dict[str, Any], tags: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Registers an agent (a directory of stages/bundle.py) as the newest version and challenger.

        Returns:
            name, version, alias, run_id, tracking_uri, weights_sha256, and champion: version and tags of the present
            one, or None; nothing without MLflow

        Raises:
            TrackingError: the store does not take it
        """
        return {}

    def close(self, status: str) -> None:
        self._events.close()


class StoredRun(Run):
    """A run in an MLflow store (`stages.tracking.Store`), which is sent all through an outbox."""

    def __init__(self, store: Any, run_id: str, parent_run_id: str, tags: dict[str, str], events: Events | NoEvents):
        super().__init__(tags, events)
        self.run_id, self.parent_run_id, self.uri = run_id, parent_run_id, store.name
        self._store = store
        about = {"run_id": run_id, "parent_run_id": parent_run_id, "tracking_uri": store.name}
        self._claim = claims.Claim(claim_files(), run_id, about)
        self._outbox = Outbox(store.send, store.name)
        self._load = store.watch_load(self._outbox, run_id)

    def metrics(self, values: dict[str, float], frames: int) -> None:
        super().metrics(values, frames)
        now = milliseconds()
        self._outbox.put(
            *[Record(self.run_id, "metric", name, float(value), now, frames) for name, value in values.items()]
        )

    def headline(self, values: dict[str, float], frames: int) -> None:
        super().headline(values, frames)
        now = milliseconds()
        records = [
            Record(self.parent_run_id, "metric", name, float(value), now, frames) for name, value in values.items()
        ]
        self._outbox.put(*records)

    def _keep_video(self, folder: str, file: str, encoded: bytes) -> None:
        path = outgoing_files() / self.run_id / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
        self._outbox.put(Record(self.run_id, "artifact", str(path), folder))

    def artifact(self, path: Path, folder: str) -> None:
        self._outbox.put(Record(self.run_id, "artifact", str(path.resolve()), folder))

    def tags(self, tags: dict[str, str]) -> None:
        super().tags(tags)
        for run_id in (self.run_id, self.parent_run_id):
            self._outbox.put(*[Record(run_id, "tag", key, str(value)) for key, value in tags.items()])

    def waiting(self) -> list[list]:
        return [list(record) for record in self._outbox.waiting()]

    def put_again(self, waiting: list[list]) -> None:
        records = [Record(*record) for record in waiting]
        self._outbox.put(*[one for one in records if one.kind != "artifact" or Path(one.key).exists()])

    def log_model(
        self, bundle: Path, params: Params, evaluation: dict[str, Any], tags: dict[str, str] | None = None
    ) -> dict[str, Any]:
        tags = self._tags | {"profile": params.profile, "run_id": self.run_id} | (tags or {})
        champion = self._store.champion()
        registered = self._store.register(self.run_id, bundle, tags | flat(evaluation))
        known = {"name": MODEL, "alias": ALIAS, "run_id": self.run_id, "tracking_uri": self.uri}
        return {**known, **registered, "champion": champion}

    def close(self, status: str) -> None:
        super().close(status)
        self._load.close()
        self._outbox.put(*[Record(run_id, "status", "", status) for run_id in (self.run_id, self.parent_run_id)])
        if unsent := self._outbox.close(PATIENCE if status != "KILLED" else PATIENCE / 6):
            path = outbox.keep(unsent_files(), self.uri, unsent)
            notice(f"{self.uri} is still away; {len(unsent)} records wait in {path} for the next stage that reaches it")
        self._claim.release()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values by dotted names, as text."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found


def milliseconds() -> int:
    return int(time.time() * 1000)


def outgoing_files() -> Path:
    return paths.ROOT / ".mario" / "outgoing"


def unsent_files() -> Path:
    return paths.ROOT / ".mario" / "unsent"


def claim_files() -> Path:
    return paths.ROOT / ".mario" / "running"
