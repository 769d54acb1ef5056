"""`python -m stages evidence`: the README's curves and tables, from committed CSV files and the shipped config.json."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from dreamer.config import ConfigError
from stages.bundle import read_config
from stages.card import results
from stages.paths import ROOT

CURVES = ROOT / "pretrained/curves"  # a directory for each training run, with its episodes.csv and evaluations.csv
README = ROOT / "README.md"
FIRST, OTHERS = ROOT / "docs/learning.svg", ROOT / "docs/levels.svg"  # figures of 1-1 and of the other levels
BUNDLE = ROOT / "pretrained"
BLOCK = r"(?<=<!-- {0} -->\n).*?(?=<!-- /{0} -->)"
LEVEL = re.compile(r"\d-\d(?=-)")  # before a run's name, where it is not 1-1
WHOLE = re.compile(r"(\d-\d-)?(even|decay|cut|kernels)-")  # runs of one command from beginning to end
WINDOW = 20  # training episodes in a running mean
FRAMES = 4  # a decision
STYLE = {"svg.hashsalt": "mario-dreamer", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


class Curves(NamedTuple):
    """Of one training run."""

    episodes: pd.DataFrame  # of training, those that began at the level's start
    evaluations: pd.DataFrame  # sampled, all from the start


def level(run: str) -> str:
    """That the run was trained on, from its name."""
    found = LEVEL.match(run)
    return found[0] if found else "1-1"


def read(directory: Path = CURVES) -> dict[str, Curves]:
    """By the run's name.

    Raises:
        ConfigError: there is none
    """
    runs = {
        path.parent.name: Curves(
            pd.read_csv(path).query("replayed == 0"), pd.read_csv(path.with_name("evaluations.csv"))
        )
        for path in sorted(directory.glob("*/episodes.csv"))
    }
    if not runs:
        raise ConfigError(f"{directory}: holds no */episodes.csv; restore it (git checkout {directory})")
    return runs


def table(runs: dict[str, Curves]) -> str:
    """Markdown, a row a run."""
    columns = ("run", "level", "decisions", "hours", "best x", "first clear", "best evaluation")
    rows = [(*columns, "cleared, last 50", "their return"), ("---",) * (len(columns) + 2)]
    for name, (episodes, evaluations) in runs.items():
        end, last, clears = episodes.iloc[-1], episodes.tail(50), episodes[episodes.clear == 1]
        first = "none"
        if len(clears):
            at = clears.iloc[0]
            first = f"after {int(at.decisions):,} decisions, {at.hours * 60:.0f} minutes"
        best = "none"
        if len(evaluations):
            at = evaluations.loc[evaluations.eval_clear_rate.idxmax()]
            best = f"{at.eval_clear_rate:.0%} at {int(at.decisions):,}" if at.eval_clear_rate else "0%"
        done = f"{int(end.decisions):,}", f"{end.hours:.2f}", f"{episodes.best_x.max():,}", first, best
        rows.append((name, level(name), *done, f"{last.clear.mean():.0%}", f"{last['return'].mean():,.0f}"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def block(name: str) -> re.Pattern[str]:
    """Finds what the README has between the comments of that name."""
    return re.compile(BLOCK.format(name), re.DOTALL)


def blocks(runs: dict[str, Curves]) -> dict[str, str]:
    """What the README has to say, by name: of the runs, and of the agent that ships."""
    shipped = read_config(BUNDLE)["lineage"]["evaluation"]
    return {"evidence": table(runs), "champion": results(shipped) + "\n"}


def figure(runs: dict[str, Curves]) -> Figure:
    """Clear rate, best x and return of the training episodes, against decisions (frames above) and against hours. Runs
    of one command from beginning to end are thick; dots are where a level's flag stands, where it was reached."""
    drawn = Figure(figsize=(11, 7), layout="constrained")
    colors = matplotlib.colormaps["tab20"].colors
    axes = drawn.subplots(3, 2, sharex="col", sharey="row")
    for color, (name, (episodes, _)) in zip(itertools.cycle(colors), runs.items(), strict=False):
        smooth = episodes[["clear", "best_x", "return"]].rolling(WINDOW, min_periods=1).mean()
        width = 2.2 if WHOLE.match(name) else 0.9
        for column, clock in enumerate(("decisions", "hours")):
            for row, value in enumerate(smooth.columns):
                axes[row, column].plot(episodes[clock], smooth[value], lw=width, label=name, color=color)
    for row, label in enumerate(("clear rate", "best x, pixels", "return")):
        axes[row, 0].set_ylabel(label)
    flags = {level(name): run.best_x.max() for name, (run, _) in runs.items() if run.clear.any()}
    for ax, (of, flag) in itertools.product(axes[1], flags.items()):
        ax.axhline(flag, color="0.6", lw=0.8, ls=":")
        place = {"xy": (0, flag), "xycoords": ax.get_yaxis_transform(), "va": "top", "fontsize": 7, "color": "0.4"}
        ax.annotate(f" end of {of}", **place)
    for ax in axes[0]:
        ax.set_ylim(-0.02, 1.02)
    for ax in axes.flat:
        ax.grid(color="0.9", lw=0.6)
    axes[2, 0].set_xlabel("decisions")
    axes[2, 1].set_xlabel("hours of training")
    above = axes[0, 0].secondary_xaxis("top", functions=(lambda x: x * FRAMES, lambda x: x / FRAMES))
    above.set_xlabel("frames, thousands")
    above.xaxis.set_major_formatter(lambda frames, _: f"{frames / 1000:.0f}")
    drawn.legend(handles=axes[0, 1].lines, frameon=False, loc="outside right upper")
    drawn.suptitle(f"Training episodes, means of {WINDOW}", fontsize=10)
    return drawn


def figures(runs: dict[str, Curves]) -> dict[Path, dict[str, Curves]]:
    """The runs that each figure shows, by its path."""
    first = {name: run for name, run in runs.items() if level(name) == "1-1"}
    others = {name: run for name, run in runs.items() if name not in first}
    return {path: of for path, of in ((FIRST, first), (OTHERS, others)) if of}


def main() -> None:
    runs = read()
    with matplotlib.rc_context(STYLE):
        for path, of in figures(runs).items():
            path.parent.mkdir(exist_ok=True)
            figure(of).savefig(path, metadata={"Date": None}, facecolor="white")
            print(f"written: {path.relative_to(ROOT)}")
    text = README.read_text()
    for name, content in blocks(runs).items():
        if not block(name).search(text):
            raise ConfigError(f"{README}: has no line '<!-- {name} -->' with '<!-- /{name} -->' below; restore it")
        text = block(name).sub(lambda _, content=content: content, text)
        print(content)
    README.write_text(text)
    print(f"written: {README.name}")
