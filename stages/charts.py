"""Learning curves as inline SVG: small panels in the page's colours, the same bytes for the same data."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Stand-ins that matplotlib draws with and the page replaces by its own colours, in light and dark.
COLORS = {f"#0000{k:02x}": f"var(--series-{k})" for k in range(1, 5)}
SERIES = tuple(COLORS)
INK, MUTED, GRID = "#000011", "#000012", "#000013"
COLORS |= {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}

NICE = [1, 2, 2.5, 5, 10]
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mario-dreamer",
    "font.size": 9,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


@dataclass
class Clock:
    """What the x axis tells: frames below with the hours they took, decisions above."""

    action_repeat: int
    frames: np.ndarray  # (N,) ascending
    hours: np.ndarray  # (N,)

    def label(self, frames: float) -> str:
        if not len(self.frames) or not self.frames[0] <= frames <= self.frames[-1]:
            return compact(frames)
        hours = float(np.interp(frames, self.frames, self.hours))
        return (
            f"{compact(frames)}\n{hours:.1f} h" if self.hours[-1] >= 1 else f"{compact(frames)}\n{60 * hours:.0f} min"
        )


@dataclass
class Chart:
    """One panel and what it says without being seen."""

    title: str
    note: str
    svg: str | None  # None: no data


def compact(value: float) -> str:
    """1500 as 1.5k, 400000 as 400k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def lines(
    table: pd.DataFrame,
    clock: Clock,
    title: str,
    columns: dict[str, str],
    *,
    note: str = "",
    unit: str = "",
    log: bool = False,
    band: tuple[str, str] | None = None,
    dots: tuple[pd.DataFrame, str, str] | None = None,
    levels: Sequence[tuple[float, str]] = (),
    best: str | None = None,
    limits: tuple[float | None, float | None] = (None, None),
) -> Chart:
    """A panel of one line a column, labelled at its end with its last value.

    Args:
        table: has `frames` and the columns
        columns: name of each column in the picture
        band: columns of the lowest and the highest value around the line
        dots: another table, its column, and its name: single values behind the lines
        levels: horizontal marks, where they stand and what they mean
        best: column that is 1 where a ring goes around the first line's point
    """
    series = {}
    for column, name in columns.items():
        if column in table and len(known := table[["frames", column]].dropna()):
            series[name] = known["frames"].to_numpy(float), known[column].to_numpy(float)

    def draw(axes: Axes) -> list[tuple[float, str, str]]:
        labels = []
        if dots is not None and len(dots[0]):
            x, y = dots[0]["frames"], dots[0][dots[1]]
            axes.plot(x, y, "o", ms=2.6, mew=0, alpha=0.45, color=SERIES[3])
            labels.append((float(y.tail(20).median()), dots[2], SERIES[3]))
        if band and set(band) <= set(table):
            low, high = table[band[0]], table[band[1]]
            axes.fill_between(table["frames"], low, high, color=SERIES[0], alpha=0.16, lw=0)
        for (name, (x, y)), color in zip(series.items(), SERIES, strict=False):
            axes.plot(x, y, color=color, lw=1.7, marker="o" if len(x) < 30 else None, ms=3.2)
            labels.append((y[-1], f"{name} {value(y[-1])}{unit}".strip(), color))
        if best and best in table and len(chosen := table[table[best] == 1]):
            last, column = chosen.iloc[-1], next(iter(columns))
            axes.plot(last["frames"], last[column], "o", ms=9, mfc="none", mec=SERIES[0], mew=1.4)
        for level, meaning in levels:
            axes.axhline(level, color=MUTED, lw=0.9, dashes=(3, 3))
            labels.append((level, meaning, MUTED))
        return labels

    if not series and (dots is None or not len(dots[0])):
        return Chart(title, note, None)
    summary = [f"{name} from {value(y[0])} to {value(y[-1])}{unit}" for name, (_, y) in series.items()]
    return Chart(title, note, _svg(title, ", ".join(summary), clock, draw, log, limits))


def value(number: float) -> str:
    """Three significant digits, thousands whole."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _svg(
    title: str,
    summary: str,
    clock: Clock,
    draw: Callable[[Axes], list[tuple[float, str, str]]],
    log: bool,
    limits: tuple[float | None, float | None],
) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.7, 2.45))
        axes = figure.add_axes((0.11, 0.19, 0.58, 0.66))
        labels = draw(axes)
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=6))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=NICE))
            axes.margins(y=0.08)
        axes.set_ylim(*limits)
        axes.set_xlim(0, 1.06 * clock.frames[-1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: compact(y)))
        axes.tick_params(length=0, which="both", pad=4)
        axes.grid(axis="y", lw=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=NICE, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: clock.label(x)))
        axes.set_xlabel("frames", loc="right", labelpad=1, fontsize=8)
        axes.xaxis.set_label_coords(1.03, -0.04)
        axes.xaxis.label.set(ha="left", va="top")
        above = axes.secondary_xaxis(
            "top", functions=(lambda x: x / clock.action_repeat, lambda x: x * clock.action_repeat)
        )
        above.xaxis.set_major_locator(MaxNLocator(4, steps=NICE, integer=True))
        above.xaxis.set_major_formatter(FuncFormatter(lambda x, _: compact(x)))
        above.tick_params(length=0, pad=3, labelsize=8)
        above.spines["top"].set_visible(False)
        axes.text(1.03, 1.045, "decisions", transform=axes.transAxes, fontsize=8, color=MUTED, va="bottom")
        for y, text, color in _spread(axes, labels):
            axes.text(1.03, y, text, transform=axes.transAxes, color=color, va="center", fontsize=9)
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(content.getvalue(), title, summary)


def _spread(axes: Axes, labels: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels at their values' heights, as parts of the axes' height, moved apart where they would overlap."""
    step = 0.1
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(np.nan_to_num(to_axes.transform((0, y))[1]).clip(0, 1)) for y, *_ in labels]
    placed: list[tuple[float, str, str]] = []
    for height, (_, text, color) in sorted(zip(heights, labels, strict=True), key=lambda pair: pair[0]):
        placed.append((max(height, placed[-1][0] + step) if placed else height, text, color))
    if placed and (excess := placed[-1][0] - 0.98) > 0:
        placed = [(height - excess, text, color) for height, text, color in placed]
    return placed


def _inline(svg: str, title: str, summary: str) -> str:
    """Ready for a page: its colours by name, ids that no other panel has, the size left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    own = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    for stand_in, color in COLORS.items():
        svg = svg.replace(stand_in, color)
    head = f'<svg role="img" aria-label="{escape(f"{title}: {summary}" if summary else title)}"'
    size = re.search(r'viewBox="[^"]*"', svg)[0]
    return f'{head} {size} xmlns:xlink="http://www.w3.org/1999/xlink">{svg[svg.index(">") + 1 :].rstrip()}'


def training_charts(
    losses: pd.DataFrame,
    evaluations: pd.DataFrame,
    episodes: pd.DataFrame,
    params: dict,
    actions: int,
    flag_x: float | None,
) -> dict[str, list[Chart]]:
    """All panels of the report by their heading. `episodes`: those of training that began at the level's start."""
    pace = pd.concat([table[["frames", "hours"]] for table in (losses, evaluations, episodes)]).sort_values("frames")
    clock = Clock(params["env"]["action_repeat"], pace["frames"].to_numpy(float), pace["hours"].to_numpy(float))
    recent = pd.DataFrame(
        {
            "frames": episodes["frames"],
            **{column: episodes[column].rolling(20, min_periods=1).median() for column in ("return", "best_x")},
            "clear": 100 * episodes["clear"].rolling(20, min_periods=1).mean(),
        }
    )
    evaluations = evaluations.assign(eval_clear_percent=100 * evaluations["eval_clear_rate"])
    clips = sorted({params["optimizers"][name]["grad_clip"] for name in ("model", "actor", "critic")})

    def evaluation(title: str, columns: dict[str, str], **options) -> Chart:
        return lines(evaluations, clock, title, columns, best="best", **options)

    def episode(title: str, columns: dict[str, str], **options) -> Chart:
        return lines(recent, clock, title, columns, **options)

    def loss(title: str, columns: dict[str, str], **options) -> Chart:
        return lines(losses, clock, title, columns, **options)

    return {
        "Playing": [
            evaluation(
                "Evaluation return",
                {"eval_return": "mean"},
                band=("eval_return_min", "eval_return_max"),
                note="Sampled, on the starts that choose the checkpoint. Band: worst to best; ring: best checkpoint.",
            ),
            evaluation(
                "Evaluation: farthest x",
                {"eval_best_x": "mean"},
                levels=[(flag_x, "flag")] if flag_x else (),
                limits=(0, None),
                unit=" px",
                note="Mean of each evaluation, in pixels from the start.",
            ),
            evaluation(
                "Evaluation clear rate",
                {"eval_clear_percent": "cleared"},
                unit="%",
                limits=(-4, 104),
                note="Share of the evaluation's episodes that reached the flag.",
            ),
            episode(
                "Training episodes: return",
                {"return": "median"},
                dots=(episodes, "return", "episodes"),
                note="Every episode that training began at the level's start, and the median of the last 20.",
            ),
            episode(
                "Training episodes: farthest x",
                {"best_x": "median"},
                dots=(episodes, "best_x", "episodes"),
                levels=[(flag_x, "flag")] if flag_x else (),
                limits=(0, None),
                unit=" px",
                note="In pixels; median of the last 20.",
            ),
            episode(
                "Training episodes: clear rate",
                {"clear": "cleared"},
                unit="%",
                limits=(-4, 104),
                note="Share of the last 20 episodes.",
            ),
        ],
        "World model and optimization": [
            loss(
                "World-model loss",
                {"model_loss": "total", "image_loss": "image"},
                log=True,
                note="Negative log-likelihoods and KL, summed; log scale.",
            ),
            loss(
                "Reward, KL and continue losses",
                {"reward_loss": "reward", "kl_loss": "KL", "continue_loss": "continue"},
                log=True,
                note="Log scale.",
            ),
            loss(
                "KL divergence",
                {"kl_divergence": "KL"},
                levels=[(params["losses"]["free_nats"], "free nats")],
                unit=" nats",
                limits=(0, None),
                note="How much an observation tells beyond what was predicted. 1 to 5 nats is usual.",
            ),
            loss(
                "Entropy of the latent state",
                {"prior_entropy": "prior", "posterior_entropy": "posterior"},
                unit=" nats",
                note="Before and after seeing the observation.",
            ),
            loss(
                "Gradient norms",
                {"model_grad_norm": "model", "actor_grad_norm": "actor", "critic_grad_norm": "critic"},
                levels=[(clip, "clipped") for clip in clips],
                log=True,
                note="Before clipping; log scale.",
            ),
            loss(
                "Throughput",
                {"frames_per_second": "frames/s", "updates_per_second": "updates/s"},
                log=True,
                note="Of training alone, without evaluations; log scale.",
            ),
        ],
        "Behaviour": [
            loss("Actor loss", {"actor_loss": "actor"}),
            loss("Critic loss", {"value_loss": "critic"}, note="Of the two-hot value distribution."),
            loss(
                "Policy entropy",
                {"policy_entropy": "policy"},
                levels=[(math.log(actions), "uniform")],
                unit=" nats",
                limits=(0, None),
                note="Falls as the actor makes up its mind.",
            ),
            loss(
                "Imagined return and value",
                {"imag_return": "return", "imag_value": "value"},
                note="Mean over the imagined trajectories; the two should agree.",
            ),
            loss("Imagined reward", {"imag_reward": "reward"}, note="Per imagined decision."),
            loss(
                "Return scale and advantage",
                {"return_scale": "scale", "advantage_magnitude": "advantage"},
                log=True,
                note="5th to 95th percentile of the returns, and the mean size of the advantage; log scale.",
            ),
        ],
    }
