"""The report says what the inputs say, and loads nothing."""

import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import gif, params, report

ROOT = Path(__file__).parents[1]
CHROMIUM = Path("/usr/bin/chromium")

LOSSES = (
    *("model_loss", "image_loss", "reward_loss", "continue_loss", "kl_loss", "kl_divergence", "prior_entropy"),
    *("posterior_entropy", "model_grad_norm", "actor_loss", "policy_entropy", "return_scale", "advantage_magnitude"),
    *("actor_grad_norm", "value_loss", "critic_grad_norm", "imag_reward", "imag_return", "imag_value"),
    *("frames_per_second", "updates_per_second"),
)
EVALUATIONS = (
    "eval_return",
    "eval_return_min",
    "eval_return_max",
    "eval_best_x",
    "eval_clear_rate",
    "eval_length",
    "best",
)
EPISODES = ("mode", "episode", "seed", "noops", "return", "best_x", "clear", "outcome", "length")


def write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def result(clears: int, best_x: int) -> dict[str, Any]:
    return {
        "episodes": 8,
        "clear_rate": clears / 8,
        "clear_rate_low": 0.31 if clears else 0.0,
        "clear_rate_high": 0.86 if clears else 0.32,
        "return_mean": 2345.6,
        "return_low": 1987.0,
        "return_high": 2712.0,
        "best_x_mean": 1876.5,
        "best_x_max": best_x,
        "length_mean": 287.0,
        "decisions_to_flag": 311.0 if clears else None,
    }


def write_inputs(root: Path, clears: int = 5, rows: int = 6) -> None:
    """All that the stage reads, with `rows` rows in each training table."""
    shutil.copy(ROOT / "params.yaml", root)
    reports, rng = root / "reports", np.random.default_rng(0)
    clock = [(4000 + 1000 * k, 1000 + 250 * k, 40 * k, 0.02 * k) for k in range(rows)]
    losses = [(*now, *np.exp(rng.normal(size=len(LOSSES)))) for now in clock]
    write_csv(reports / "training/losses.csv", ("frames", "decisions", "updates", "hours", *LOSSES), losses)
    evaluations = [(*now, 500 + 50 * k, 300, 900, 700 + k, 0.1, 200, k % 2) for k, now in enumerate(clock)]
    names = ("frames", "decisions", "updates", "hours", *EVALUATIONS)
    write_csv(reports / "training/evaluations.csv", names, evaluations)
    played = [(now[0], now[1], now[3], k, 0, 400.5, 500 + k, 0, "death", 99) for k, now in enumerate(clock)]
    names = ("frames", "decisions", "hours", "seed", "replayed", "return", "best_x", "clear", "outcome", "length")
    write_csv(reports / "training/episodes.csv", names, played)
    counts = {"frames": 9876, "decisions": 2469, "updates": 321, "episodes": 17, "hours": 0.25}
    speed = {"best_return": 987.0, "best_frames": 8000, "frames_per_second": 21.3, "updates_per_second": 1.37}
    write_json(reports / "training/summary.json", {**counts, **speed})

    episodes = [
        (mode, k, 200000 + k, 3 * k, 4077.5 if k < clears else 812.25 + k, 3161 if k < clears else 876 + k)
        + ((1, "flag", 311) if k < clears else (0, ("death", "time limit", "stall")[k % 3], 144 + k))
        for mode in ("sampled", "greedy")
        for k in range(8)
    ]
    write_csv(reports / "episodes.csv", EPISODES, episodes)
    reach = 3161 if clears else 883
    checkpoint = {"frames": 8000, "score": 987.0}
    modes = {"sampled": result(clears, reach), "greedy": result(0, 2222)}
    write_json(reports / "evaluation.json", {**modes, "checkpoint": checkpoint})
    model = {"name": "mario-dreamer", "version": "3", "alias": "challenger", "run_id": "d" * 32}
    known = {f"sampled.{key}": str(value) for key, value in result(2, 3161).items()}
    stored = {"tracking_uri": "sqlite:///mlflow.db", "weights_sha256": "3" * 64}
    write_json(reports / "model.json", {**model, **stored, "champion": {"version": "2", "tags": known}})
    write_json(reports / "promotion.json", {})

    shades = [np.full((240, 256, 3), 40 * k, np.uint8) for k in range(5)]
    index = []
    for row in (dict(zip(EPISODES, episodes[k], strict=True)) for k in (0, 8)):
        name = f"{row['mode']}-{row['seed']}.gif"
        (reports / "gifs").mkdir(exist_ok=True)
        gif.write(reports / "gifs" / name, shades, 20)
        index.append(
            {"file": name, "kind": "episode", **{key: row[key] for key in EPISODES if key not in ("episode", "noops")}}
        )
    for kind in ("learning", "open_loop"):
        gif.write(reports / f"gifs/{kind}.gif", shades, 10)
        blank = dict.fromkeys(index[0].keys() - {"file", "kind"})
        index.append({"file": f"{kind}.gif", "kind": kind, **blank, "length": 5})
    write_json(reports / "gifs/index.json", index)

    effective = params.load(ROOT / "params.yaml", profile="debug").to_dict()
    write_json(
        root / "checkpoints/provenance.json",
        {
            **{"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True, "profile": "debug"},
            **{"params": effective, "data_sha256": "da7a" * 16, "rom_sha256": "8036" * 16, "seed": 0},
            "hardware": {"cpu": "<script>alert('Xeon')</script>", "cores": 2, "gpu": None, "memory_gb": 16.4},
            "versions": {"python": "3.13.1", "torch": "2.15.0"},
            **{"started": "2026-11-22T10:00:00+00:00", "finished": "2026-11-22T10:15:00+00:00", "resumed": 2},
            "mlflow": {"run_id": "f" * 32, "parent_run_id": "e" * 32, "tracking_uri": "sqlite:///mlflow.db"},
        },
    )


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build() -> str:
    report.write()
    return report.PAGE.read_text()


def text_of(page: str) -> str:
    """What a reader sees: no markup, one space between words."""
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


class Loads(HTMLParser):
    """Collects what a browser would fetch, checks that tags nest, and that no id comes twice."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "hr"})

    def __init__(self, page: str):
        super().__init__()
        self.urls: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.urls += [values[key] for key in ("src", "srcset", "data", "poster", "xlink:href") if values.get(key)]
        if tag not in ("a",) and values.get("href"):
            self.urls.append(values["href"])
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "img":
            self.images.append(values)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_holds_the_inputs_numbers(root):
    write_inputs(root)
    page = text_of(build())
    for words in (
        "It clears level 1-1 in 5 of 8 episodes (62%; 95% interval of the clear rate 31% to 86%)",
        "The mean return is 2,346 (95% interval 1,987 to 2,712)",
        "9,876 frames of play, 15 minutes of training",
        "Sampled, n = 8",
        "Decisions to the flag, median 311 –",
        "sampled 200001 3 flag 3,161 4,077.5 311",
        "greedy 200007 21 time limit 883 819.2 151",
        "0123456789abcdef0123456789abcdef01234567 with uncommitted changes",
        "da7a" * 16,
        "8036" * 16,
        "resumed 2 times; 9,876 frames, 2,469 decisions, 321 updates, 17 episodes, 15 minutes",
        "21.3 frames/s, 1.37 updates/s",
        "8,000 frames, return 987.0 on the starts that chose it",
        "mario-dreamer, version 3 (challenger)",
        ".venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db",
        "git checkout 0123456789abcdef0123456789abcdef01234567",
        "train.steps 10000 400000",
        "shown 1.3 times as fast as played",
        "Version 2 was champion when this model was registered as version 3. The gate has not judged yet",
        "version 3, this one 62% [31% to 86%] 2,346 [1,987 to 2,712]",
        "version 2, champion 25% [31% to 86%] 2,346 [1,987 to 2,712]",
        ".venv/bin/mario promote 3",
        ".venv/bin/mario play --web --model 3",
        ".venv/bin/mario lineage 3 .venv/bin/mario reproduce 3",
        "weights " + "3" * 64,
        "as the model imagined it after so much of its training",
    ):
        assert words in page, words


def verdict(root: Path, **changes: Any) -> None:
    """What `mario promote 3` leaves for the report."""
    results = {"challenger": result(6, 3161), "champion": result(1, 3161)}
    known = {"version": "3", "champion": "2", "weights_sha256": {"challenger": "3" * 64}, "results": results}
    known |= {"status": "PASS", "promoted": True, "kind": "promotion", "at": "2026-11-22T17:00:00+00:00"}
    known |= {"reasons": ["clears 75% against <12%>"], "rule": {"confidence": 0.95}, "test": {"name": "McNemar"}}
    write_json(root / "reports/promotion.json", {**known, **changes})


def test_the_gate_s_verdict_comes_onto_the_page(root):
    write_inputs(root)
    verdict(root)
    page = text_of(build())
    for words in (
        "PASS Version 3 became champion in place of version 2, 2026-11-22T17:00:00+00:00. clears 75% against <12%>",
        "version 3, this one 75% [31% to 86%]",
        "version 2, champion 12% [31% to 86%]",
        "8 episodes each from the same starts",
        "better with 95% confidence",
    ):
        assert words in page, words
    assert "mario promote 3" not in page
    verdict(root, status="FAIL", promoted=False)
    assert "FAIL Version 3 was not promoted" in text_of(build())
    verdict(root, status="FAIL", kind="forced")
    assert "FAIL Version 3 became champion by force in place of version 2" in text_of(build())
    verdict(root, status="ERROR", promoted=False, results={}, reasons=["its files are others"])
    assert "ERROR Version 3 was not promoted in place of" not in (page := text_of(build()))
    assert "its files are others" in page


@pytest.mark.parametrize("changes", [{"version": "4"}, {"weights_sha256": {"challenger": "4" * 64}}])
def test_a_verdict_on_another_model_is_not_shown(root, changes):
    write_inputs(root)
    verdict(root, **changes)
    assert "The gate has not judged yet" in text_of(build())


def test_the_page_loads_nothing_and_is_well_formed(root):
    write_inputs(root)
    page = build()
    loads = Loads(page)
    assert loads.open == []
    assert len(loads.urls) > 3
    assert [url for url in loads.urls if not url.startswith(("data:", "#"))] == []
    assert re.findall(r"url\((?!#)|@import|<script|<iframe|<object|<embed", page) == []
    assert len(loads.ids) == len(set(loads.ids)) > 20
    assert len(loads.images) == 4
    assert all(image["alt"] and image["width"] and image["height"] for image in loads.images)
    assert page.count('<svg role="img" aria-label="') == 18
    assert "&lt;script&gt;alert(" in page


def test_the_same_inputs_give_the_same_bytes(root):
    write_inputs(root)
    first = build()
    assert build() == first
    write_inputs(root, clears=4)
    assert build() != first


def test_only_parameters_that_differ_from_the_defaults_are_marked(root):
    write_inputs(root)
    page = build()
    marked = re.findall(r'<tr class="changed"><th scope="row"><code>([^<]*)', page)
    debug, defaults = (report.flat(params.load(profile=name).to_dict()) for name in ("debug", "defaults"))
    assert marked == [name for name in debug if debug[name] != defaults[name] and name != "profile"]
    assert "model.deter" in marked


@pytest.mark.parametrize("rows", [0, 1])
def test_a_training_too_short_for_curves_is_reported(root, rows):
    write_inputs(root, clears=0, rows=rows)
    page = build()
    assert page.count('<svg role="img"') == 18 * rows
    assert text_of(page).count("no data yet") == 18 * (1 - rows)


def test_no_clears_no_mlflow_no_git_and_lines_that_are_zero(root):
    write_inputs(root, clears=0)
    provenance = json.loads(report.PROVENANCE.read_text())
    write_json(report.PROVENANCE, {**provenance, "commit": None, "dirty": None, "mlflow": None, "resumed": 0})
    write_json(Path("reports/model.json"), {})
    curve = Path("reports/training/losses.csv")
    header, *lines = curve.read_text().splitlines()
    zero = header.split(",").index("continue_loss")
    rows = [",".join("0" if k == zero else cell for k, cell in enumerate(line.split(","))) for line in lines]
    rows[0] = ",".join([*lines[0].split(",")[:4], *[""] * len(LOSSES)])  # before the first update
    curve.write_text("\n".join([header, *rows]) + "\n")
    page = text_of(build())
    for words in (
        "It does not clear level 1-1 yet: none of 8 episodes (95% interval of the clear rate 0% to 32%); "
        "it gets at best to x = 883 of 3,161 (28% of the way to the flag).",
        "Code not a git checkout",
        "MLflow run not tracked",
        "none: MLflow was switched off or out of reach",
    ):
        assert words in page
    assert "resumed" not in page
    assert "git checkout" not in page.replace("not a git checkout", "")


def test_a_damaged_input_is_one_line_that_names_it(root):
    write_inputs(root)
    Path("reports/evaluation.json").write_text("{")
    with pytest.raises(report.ReportError, match=r"^reports/evaluation\.json: damaged .*dvc checkout"):
        report.write()
    write_inputs(root)
    Path("reports/training/losses.csv").write_text("")
    with pytest.raises(report.ReportError, match=r"^reports/training/losses\.csv: damaged .*dvc checkout"):
        report.write()
    assert not report.PAGE.exists()


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (apt install chromium) to look at the page")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_without_a_network_shows_it_all_without_sideways_scrolling(root, width):
    write_inputs(root)
    probe = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
        images: [...document.images].map((image) => image.naturalWidth),
        loaded: performance.getEntriesByType("resource").map((entry) => entry.name).filter((u) => !/^data:/.test(u)),
        seen: innerWidth, needed: document.documentElement.scrollWidth,
        charts: [...document.querySelectorAll(".charts svg")].map((chart) => chart.getBoundingClientRect().width),
        ink: getComputedStyle(document.querySelector(".charts svg text")).fill,
    }), "*"))</script>"""
    Path("probed.html").write_text(build().replace("</body>", f"{probe}</body>"))
    # In a frame, because a window of Chromium is never narrower than 500 pixels.
    Path("frame.html").write_text(
        f"""<script>onmessage = (event) => {{ document.title = event.data }}</script>
        <iframe src="probed.html" style="width: {width}px; height: 900px; border: 0"></iframe>"""
    )
    found = subprocess.run(
        [
            *(
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
            ),
            *(
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={root / 'profile'}",
                "--window-size=1400,1000",
            ),
            *("--virtual-time-budget=10000", "--dump-dom", (root / "frame.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    title = re.search(r"<title>(.*?)</title>", found, flags=re.DOTALL)
    assert title, found[:500]
    seen = json.loads(html.unescape(title[1]))
    assert seen["images"] == [256, 256, 256, 256]
    assert seen["loaded"] == []
    assert seen["seen"] == width
    assert seen["needed"] <= width
    assert len(seen["charts"]) == 18
    assert min(seen["charts"]) > 280
    assert seen["ink"] == "rgb(102, 107, 117)"  # the page's muted, not the stand-in it was drawn with
