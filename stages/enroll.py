"""Registers a bundle that was made elsewhere, as what it says it is. Not a stage; `mario demo` uses it."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stages import lineage, tracking
from stages.bundle import read_config
from stages.params import Params


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="enroll", description="Registers a bundle.")
    parser.add_argument("bundle", type=Path, metavar="DIRECTORY")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what the registry made of it, as JSON")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    config = read_config(args.bundle)
    origin = config["lineage"]
    params = Params.from_dict(origin["params"])  # those it was trained with
    with tempfile.TemporaryDirectory(prefix="mario-enroll-") as folder, tracking.run("enroll", params) as run:
        made = Path(folder) / "bundle"  # under the name that every registered one has, without the curves
        made.mkdir()
        for path in filter(Path.is_file, args.bundle.iterdir()):
            shutil.copyfile(path, made / path.name)
        run.headline({f"sampled_{key}": value for key, value in _numbers(origin).items()}, config["frames"])
        model = run.log_model(made, params, origin["evaluation"], lineage.tags(origin))
    args.out.write_text(json.dumps(model) + "\n")


def _numbers(origin: dict) -> dict[str, float]:
    return {
        key: float(value) for key, value in origin["evaluation"]["sampled"].items() if isinstance(value, int | float)
    }
