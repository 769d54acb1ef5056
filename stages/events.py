"""TensorBoard event files: the same scalars and animations as in MLflow, readable without any server."""

import time
from pathlib import Path

from stages.outbox import notice


class Events:
    """Writes into a directory, each time it is opened a file of its own. Opens it with the first thing to write.

    Args:
        resumed: what the directory holds from the first step on is to be forgotten, as it is done again
    """

    def __init__(self, directory: Path, resumed: bool = False):
        self.directory = directory
        self._writer, self._resumed, self._off = None, resumed, False

    def scalars(self, values: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(
            Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]), step
        )

    def animation(self, name: str, gif: bytes, step: int) -> None:
        """A GIF as it is, which TensorBoard plays under Images."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = (int.from_bytes(gif[at : at + 2], "little") for at in (6, 8))
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self._write(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def _write(self, summary, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if self._off:
            return
        now = time.time()
        try:
            if self._writer is None:
                self._writer = _open(self.directory)
                if self._resumed:
                    start = SessionLog(status=SessionLog.START)
                    self._writer.add_event(Event(wall_time=now, step=step, session_log=start))
            self._writer.add_event(Event(wall_time=now, step=step, summary=summary))
        except OSError as error:  # a full disk must not end training here; the checkpoint will tell
            self._off = True
            notice(f"no more TensorBoard events in {self.directory}: {error.strerror or error}")

    def close(self) -> None:
        if self._writer is not None and not self._off:
            self._writer.close()


class NoEvents:
    """Where TensorBoard is not installed."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        pass

    def animation(self, name: str, gif: bytes, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def open_events(directory: Path, resumed: bool) -> Events | NoEvents:
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ModuleNotFoundError:
        notice("TensorBoard is not installed, no event files (pip install tensorboard)")
        return NoEvents()
    return Events(directory, resumed)


def _open(directory: Path):
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return EventFileWriter(str(directory), max_queue_size=1000, flush_secs=5)
