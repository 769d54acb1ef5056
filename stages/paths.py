"""Where the stages leave what the next ones read, relative to the repository's root."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # for what is written wherever the working directory is

ARCHIVE = "archive.json"  # in the seed data: where its episodes have been
SEED_DATA = Path("data/seed")
REPLAY = Path("data/replay")

CHECKPOINTS = Path("checkpoints")
BEST = CHECKPOINTS / "best.pt"
SNAPSHOTS = "snapshot-{:03}.pt"  # in it: the weights after so many percent of training
PROVENANCE = CHECKPOINTS / "provenance.json"

REPORTS = Path("reports")
TRAINING = REPORTS / "training"
EVALUATION = REPORTS / "evaluation.json"
EPISODES = REPORTS / "episodes.csv"
ACTIONS = REPORTS / "actions.json"
MODEL = REPORTS / "model.json"
VERDICT = REPORTS / "promotion.json"  # the gate's last one; {} before the first
GIFS = REPORTS / "gifs"
PAGE = REPORTS / "report.html"
