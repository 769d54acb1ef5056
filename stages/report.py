"""One page that tells what was trained, how well it plays and where it came from; it needs no network to be read."""

import base64
import json
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from PIL import Image

from dreamer.mario import ACTIONS, FRAMES_PER_SECOND
from stages import tracking
from stages.charts import compact, training_charts
from stages.params import load
from stages.paths import EPISODES, EVALUATION, GIFS, MODEL, PAGE, PROVENANCE, TRAINING, VERDICT

TEMPLATE = "page.html"

FLAG_X = {"1-1": 3161}  # where an episode that reaches the flag ends, in pixels

MEASURES = (  # name, key, and how to say it: value, then low and high of its interval
    ("Clear rate", "clear_rate", "percent"),
    ("Return, mean", "return", "number"),
    ("Farthest x, mean", "best_x_mean", "pixels"),
    ("Farthest x, best", "best_x_max", "pixels"),
    ("Decisions per episode, mean", "length_mean", "number"),
    ("Decisions to the flag, median", "decisions_to_flag", "number"),
)


TOLD = ("clear_rate", "clear_rate_low", "clear_rate_high", "return_mean", "return_low", "return_high")  # of a champion


class ReportError(ValueError):
    """An input is damaged. The message names the file and the remedy."""


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ReportError(f"{path}: damaged ({error}); restore it: dvc checkout --force {path}") from None


def read_csv(path: Path) -> pd.DataFrame:
    """With a header at least; a table without rows has none."""
    try:
        return pd.read_csv(path)
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise ReportError(f"{path}: damaged ({error}); restore it: dvc checkout --force {path}") from None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters as `group.name`."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def flag_position(level: str, episodes: pd.DataFrame) -> float | None:
    """In pixels: known, or where the evaluated clears ended; None where neither tells."""
    clears = episodes[episodes["clear"] == 1]
    return FLAG_X.get(level) or (float(clears["best_x"].max()) if len(clears) else None)


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:,.{digits}f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def headline(result: dict[str, Any], level: str, flag_x: float | None) -> str:
    """The sampled result in one sentence."""
    n, clears = result["episodes"], round(result["clear_rate"] * result["episodes"])
    rate = f"95% interval of the clear rate {percent(result['clear_rate_low'])} to {percent(result['clear_rate_high'])}"
    if clears:
        return f"It clears level {level} in {clears} of {n} episodes ({percent(result['clear_rate'])}; {rate})."
    reach = f"at best to x = {number(result['best_x_max'])}"
    if flag_x:
        reach += f" of {number(flag_x)} ({percent(result['best_x_max'] / flag_x)} of the way to the flag)"
    return f"It does not clear level {level} yet: none of {n} episodes ({rate}); it gets {reach}."


def measure(result: dict[str, Any], key: str, kind: str) -> dict[str, str]:
    """A cell of the results table: the value, and its interval where there is one."""
    say = {"percent": percent, "number": number, "pixels": lambda value: f"{number(value)} px"}[kind]
    value = result[key if key in result else f"{key}_mean"]
    if value is None:
        return {"value": "–", "interval": ""}
    interval = f"{say(result[f'{key}_low'])} to {say(result[f'{key}_high'])}" if f"{key}_low" in result else ""
    return {"value": say(value), "interval": interval}


def picture(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """A GIF for the page: its content as a data URI, its size, and what the index says about it."""
    with Image.open(path) as image:
        width, height = image.size
        frames = image.n_frames
    content = base64.b64encode(path.read_bytes()).decode()
    return {**entry, "uri": f"data:image/gif;base64,{content}", "width": width, "height": height, "frames": frames}


def parameters(effective: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a parameter; `changed` where a profile or a person departs from the defaults."""
    known = flat(defaults)
    return [
        {"name": name, "value": value, "default": known.get(name), "changed": value != known.get(name)}
        for name, value in flat(effective).items()
        if name != "profile"
    ]


def promotion(model: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
    """How the model stands to the champion: what the gate said, or before that, both as they were evaluated.

    Args:
        model: reports/model.json, empty where nothing was registered
        verdict: reports/promotion.json, of whichever version was judged last
    """
    same = bool(model) and verdict.get("weights_sha256", {}).get("challenger") == model.get("weights_sha256")
    if same and verdict.get("version") == model["version"]:
        rows = [
            {"who": who, "version": verdict["version" if who == "challenger" else "champion"], **_told(of)}
            for who, of in verdict["results"].items()
        ]
        return {"verdict": verdict, "rows": rows, "champion": verdict["champion"]}
    champion = model.get("champion")
    rows = []
    if champion:
        known = {key.removeprefix("sampled."): value for key, value in champion["tags"].items()}
        numbers = {key: float(known[key]) for key in TOLD if known.get(key) not in (None, "None")}
        rows = [{"who": "champion", "version": champion["version"], **_told(numbers)}]
    return {"verdict": None, "rows": rows, "champion": champion and champion["version"]}


def _told(result: dict[str, Any]) -> dict[str, Any]:
    if any(key not in result for key in TOLD):
        nothing = {"value": "–", "interval": ""}
        return {"clear_rate": nothing, "return": nothing, "episodes": result.get("episodes")}
    return {
        "clear_rate": measure(result, "clear_rate", "percent"),
        "return": measure(result, "return", "number"),
        "episodes": result.get("episodes"),
    }


def contents() -> dict[str, Any]:
    """All that the page shows, from the files of the stages before.

    Raises:
        ReportError: one of them is damaged
        FileNotFoundError: one of them is missing
    """
    params = load()
    provenance, evaluation = read_json(PROVENANCE), read_json(EVALUATION)
    episodes = read_csv(EPISODES)
    # What was trained with, and what it was evaluated and shown with.
    effective = {**provenance["params"], "evaluate": params.evaluate.to_dict(), "render": params.render.to_dict()}
    effective.pop("promote", None)  # none of this page's results depends on it
    model = read_json(MODEL)
    env = effective["env"]
    flag_x = flag_position(env["level"], episodes)
    modes = {mode: evaluation[mode] for mode in ("sampled", "greedy")}
    losses, evaluations, trained = (
        read_csv(TRAINING / f"{name}.csv") for name in ("losses", "evaluations", "episodes")
    )
    trained = trained[trained["replayed"] == 0]
    charts = training_charts(losses, evaluations, trained, effective, len(ACTIONS), flag_x)
    pictures = [picture(GIFS / entry["file"], entry) for entry in read_json(GIFS / "index.json")]
    return {
        "level": env["level"],
        "sentence": headline(modes["sampled"], env["level"], flag_x),
        "modes": modes,
        "table": [(name, [measure(modes[mode], key, kind) for mode in modes]) for name, key, kind in MEASURES],
        "flag_x": flag_x,
        "reach": flag_x or max(1, *episodes["best_x"]) if len(episodes) else 1,
        "films": [entry for entry in pictures if entry["kind"] == "episode"],
        "dreams": [entry for entry in pictures if entry["kind"] == "open_loop"],
        "learning": [entry for entry in pictures if entry["kind"] == "learning"],
        "speed": params.render.fps * env["action_repeat"] / FRAMES_PER_SECOND,
        "context": params.render.context,
        "charts": {
            heading: [
                {"title": chart.title, "note": chart.note, "svg": Markup(chart.svg) if chart.svg else None}
                for chart in panels
            ]
            for heading, panels in charts.items()
        },
        "action_repeat": env["action_repeat"],
        "noop_max": env["noop_max"],
        "summary": read_json(TRAINING / "summary.json"),
        "checkpoint": evaluation["checkpoint"],
        "episodes": episodes.astype(object).to_dict("records"),
        "provenance": provenance,
        "parameters": parameters(effective, load(profile="defaults").to_dict()),
        "model": model,
        "promotion": promotion(model, read_json(VERDICT)),
    }


def page(content: dict[str, Any]) -> str:
    """The HTML, everything inlined and escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "compact": compact}
    return environment.get_template(TEMPLATE).render(content)


def write() -> None:
    """The page, whole or not at all."""
    html = page(contents())
    temporary = PAGE.with_name(PAGE.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(PAGE)
    print(f"report: {PAGE.resolve().as_uri()} ({len(html) / 1e6:.1f} MB, needs no network)")


def main() -> None:
    data = read_json(PROVENANCE)["data_sha256"]
    with tracking.run("report", load(), {"data_sha256": data}) as run:
        write()
        run.artifact(PAGE, "report")
