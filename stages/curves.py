"""Training curves as CSV files, one row appended at a time and cut back when training goes on from an earlier frame."""

import csv
import io
from pathlib import Path
from typing import Any


class Curve:
    """A CSV file whose first column is `frames`. Floats are written with six significant digits."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        self.path, self.columns = path, ("frames", *columns)

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; its keys are the columns, missing ones stay empty.

        Raises:
            ValueError: a key is no column
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if not self.path.exists():
            writer.writeheader()
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        with self.path.open("a") as file:
            file.write(text.getvalue())

    def rewind(self, frames: int) -> None:
        """Drops the rows after `frames`, a half-written last one too."""
        if not self.path.exists():
            return
        header, *lines = self.path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and int(line.split(",", 1)[0]) <= frames]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(header + "".join(kept))
        temporary.replace(self.path)
