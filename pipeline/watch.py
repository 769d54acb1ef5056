"""Looks after one run of the pipeline: ends what runs when the run is cancelled, or out of time."""

import contextlib
import threading
from uuid import UUID

from pipeline.session import Session

LOOK_EVERY = 1.0  # seconds
CANCELLED, OUT_OF_TIME = "cancelled", "out of time"


class Watch:
    """`why` is None, or why no stage may begin any more.

    Args:
        stop_seconds: what a stage gets to save its work
        minutes: the run's budget by the clock on the wall, 0 for none
    """

    def __init__(self, flow_run_id: UUID, stop_seconds: float, minutes: float):
        self.why: str | None = None
        self._flow_run_id, self._stop_seconds = flow_run_id, stop_seconds
        self._budget = threading.Timer(minutes * 60, self.stop, (OUT_OF_TIME,)) if minutes else None
        self._sessions: set[Session] = set()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        if self._budget:
            self._budget.daemon = True
            self._budget.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._budget:
            self._budget.cancel()
        self.stop(CANCELLED)
        self._thread.join(10)

    @contextlib.contextmanager
    def over(self, session: Session):
        """Ends the session, too, when the run ends; the block runs it."""
        with self._lock:
            self._sessions.add(session)
        if self.why:
            session.stop(self._stop_seconds)
        try:
            yield
        finally:
            with self._lock:
                self._sessions.discard(session)

    def stop(self, why: str) -> None:
        """Comes back when nothing runs any more."""
        with self._lock:
            self.why = self.why or why
            sessions = list(self._sessions)
        threads = [threading.Thread(target=one.stop, args=(self._stop_seconds,)) for one in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            while not self._over.wait(LOOK_EVERY):
                with contextlib.suppress(Exception):  # the server is away: it does not end the run
                    state = client.read_flow_run(self._flow_run_id).state
                    if state and (state.is_cancelling() or state.is_cancelled()):
                        return self.stop(CANCELLED)
        return None
