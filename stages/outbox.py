"""Records on their way to a tracking store: queued by a stage, sent by a thread, kept while the store is away."""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

SEND_EVERY = 2.0  # seconds
LONGEST_PAUSE = 60.0  # seconds between two attempts to reach a store that is away
BATCH = {"metric": 1000, "tag": 100, "artifact": 1, "status": 1}  # records in one call


class Record(NamedTuple):
    """What is to be written into a run. `key` and `value` are a name and its value; of an artifact, its path here and
    its folder there; of a status, "" and the status."""

    run_id: str
    kind: Literal["metric", "tag", "artifact", "status"]
    key: str
    value: float | str
    timestamp: int = 0  # milliseconds
    step: int = 0


class Refused(Exception):
    """The store will never take these records: they are dropped. The message is one line."""


class Outbox:
    """Sends records in the order in which they were put.

    Args:
        send: gets one or more records of one run and kind; raises `Refused`, or anything else to be called again with
            the same records
        store: what notices call the store
    """

    def __init__(self, send: Callable[[list[Record]], None], store: str):
        self._send, self._store = send, store
        self._records: deque[Record] = deque()
        self._batch: list[Record] = []  # taken from the queue and not sent yet
        self._lock = threading.Lock()  # of both, while a record moves from one to the other
        self._closed, self._give_up = threading.Event(), 0.0
        self._patience = 0.0
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def put(self, *records: Record) -> None:
        """Costs about a microsecond a record, whatever the store does."""
        with self._lock:
            self._records.extend(records)

    def waiting(self) -> list[Record]:
        """What has not been sent yet, as far as is known."""
        with self._lock:
            return [*self._batch, *self._records]

    def close(self, patience: float) -> list[Record]:
        """Sends the rest. Gives up once the store has taken nothing for `patience` seconds.

        Returns:
            what could not be sent
        """
        self._patience = patience
        self._give_up = time.monotonic() + patience
        self._closed.set()
        self._thread.join()
        return self.waiting()

    def _work(self) -> None:
        failures = 0
        while True:
            if failures and self._closed.is_set():
                time.sleep(min(1.0, self._patience))
            else:
                self._closed.wait(min(SEND_EVERY * 2**failures, LONGEST_PAUSE))
            last_round = self._closed.is_set()  # read before sending: nothing is put any more
            try:
                self._send_all()
            except Exception as error:  # of any kind: tracking must not end training
                failures += 1
                if failures == 1:
                    reason = " ".join(str(error).split())[:200]
                    notice(f"{self._store} is away; what is to be logged is kept, and tried again ({reason})")
                if last_round and time.monotonic() > self._give_up:
                    return
                continue
            if failures:
                notice(f"{self._store} is back; all that was kept is logged")
                failures = 0
            if last_round:
                return

    def _send_all(self) -> None:
        while self._batch or self._records:
            if not self._batch:
                self._take()
            try:
                self._send(self._batch)
            except Refused as error:
                notice(f"not logged: {error}")
            with self._lock:
                self._batch = []
            self._give_up = time.monotonic() + self._patience

    def _take(self) -> None:
        with self._lock:
            first = self._records.popleft()
            self._batch = [first]
            while self._records and len(self._batch) < BATCH[first.kind] and self._records[0][:2] == first[:2]:
                self._batch.append(self._records.popleft())


def keep(folder: Path, store: str, records: list[Record]) -> Path:
    """Adds records that could not be sent to `<run_id>.jsonl`."""
    path = folder / f"{records[0].run_id}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps([store, *record]) + "\n" for record in records)
    return path


def kept(folder: Path, store: str) -> Iterator[tuple[Path, list[Record]]]:
    """The files of `keep` that belong to a store. Whoever has sent a file's records removes it."""
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if lines and lines[0][0] == store:
            yield path, [Record(*line[1:]) for line in lines]


def notice(line: str) -> None:
    """One line for people, which does not mix with what a stage prints."""
    print(f"tracking: {line}", file=sys.stderr, flush=True)
