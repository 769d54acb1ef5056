"""The live page in a real browser: it shows what is there, and every control does what it says."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from live import Served
from PIL import Image

from stages.live.hands import NAMES
from stages.live.session import AHEAD
from stages.live.views import view

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM} (apt install chromium)")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield browser
        browser.close()


class Watched:
    """A page in the browser, and the session that it shows."""

    def __init__(self, browser, served: Served, width: int = 1280, height: int = 800, **options):
        self.served, self.session = served, served.stage.session
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("requestfailed", lambda request: self.troubles.append(request.url))
        self.page.goto(served.url)
        self.shows("#facts", "level")

    def shows(self, selector: str, text: str) -> None:
        self.page.locator(selector, has_text=text).first.wait_for(state="attached")

    def state(self, state: str) -> None:
        self.page.locator(f'body[data-state="{state}"]').wait_for()

    def pause(self) -> None:
        self.state("running")
        self.page.keyboard.press("Space")
        self.state("paused")

    def step(self) -> None:
        """One decision, of a paused session, until the page shows it."""
        before = self.session.episode.decisions
        self.page.keyboard.press("n")
        self.shows("#facts", f"decision {before + 1} ")


@pytest.fixture
def watch(browser, served):
    opened = []

    def watch(**options) -> Watched:
        opened.append(Watched(browser, served, **options))
        return opened[-1]

    yield watch
    for watched in opened:
        assert watched.troubles == []
        watched.context.close()


def canvas(watched: Watched, name: str) -> np.ndarray:
    """A canvas's pixels, (H, W, 4)."""
    address = watched.page.locator(name).evaluate("(canvas) => canvas.toDataURL('image/png')")
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGBA"))


def assert_shown(watched: Watched, name: str, picture: np.ndarray) -> None:
    np.testing.assert_array_equal(canvas(watched, name)[..., :3], picture)


def test_the_page_shows_what_is_there(watch):
    watched = watch()
    watched.pause()
    session = watched.session
    watched.step()
    watched.shows("#ahead-note", "from here")
    numbers, pictures = view(session)
    for name, picture in {"#screen": "screen", "#sees": "sees", "#model": "model"}.items():
        assert_shown(watched, name, pictures[picture])
    films = watched.page.locator("#film canvas")
    assert films.count() == AHEAD
    for k in (0, AHEAD - 1):
        assert_shown(watched, f"#film li:nth-child({k + 1}) canvas", session.film.thoughts.image[k])
    assert watched.page.locator("#bars li span:first-child").all_text_contents() == list(NAMES)
    assert watched.page.locator("#bars li.chosen").inner_text().startswith(NAMES[numbers["action"]])
    for chart in ("value", "reward", "goes_on"):
        assert np.ptp(canvas(watched, f"#chart-{chart}")[..., 3]) > 0
    assert watched.page.locator("#goes_on").inner_text().endswith("%")


def test_every_button_and_field(watch):
    watched = watch()
    page, stage, session = watched.page, watched.served.stage, watched.session
    watched.state("running")
    page.click("#run")
    watched.state("paused")
    before = session.episode.decisions
    page.click("#step")
    watched.shows("#facts", f"decision {before + 1} ")
    page.get_by_text("30", exact=True).click()
    page.locator('#speeds input[value="30"]:checked').wait_for(state="attached")
    assert stage.speed == 30
    page.get_by_text("greedy", exact=True).click()
    page.locator('#modes input[value="greedy"]:checked').wait_for(state="attached")
    page.click("#step")
    watched.shows("#facts", f"decision {before + 2} ")
    assert session.policy.greedy
    page.click("#next")
    watched.shows("#facts", "seed 4")
    watched.shows("#episodes", "stopped")
    page.fill("#seed", "21")
    page.select_option("#level", "1-2")
    page.click("#setup button")
    watched.shows("#facts", "level 1-2 · seed 21 ")
    page.locator('#models option[value="two.pt"]').wait_for(state="attached")
    page.select_option("#models", "two.pt")
    watched.shows("#facts", "two.pt")
    page.select_option("#models", "three.pt")
    watched.shows("#banner", "three.pt: no such checkpoint")
    assert page.locator("#models").input_value() == "two.pt"
    page.click("#take")
    page.locator("#pad").wait_for()
    page.click("#take")
    page.locator("#pad").wait_for(state="hidden")
    page.click("#dream")
    watched.shows("#mind-title", "The dream")
    page.click("#dream")
    watched.shows("#mind-title", "What the model sees")
    page.click("#help")
    page.locator("#shortcuts").wait_for()
    page.get_by_text("Close").click()
    page.locator("#shortcuts").wait_for(state="hidden")
    page.click("#run")
    watched.state("running")


def test_the_keyboard_alone_drives_everything(watch):
    watched = watch()
    page, session = watched.page, watched.session
    press = page.keyboard.press
    watched.pause()
    for key, speed in (("+", 30), ("-", 15), ("-", 5)):
        press(key)
        page.locator(f'#speeds input[value="{speed}"]:checked').wait_for(state="attached")
    press("g")
    page.locator('#modes input[value="greedy"]:checked').wait_for(state="attached")
    press("g")
    page.locator('#modes input[value="sampled"]:checked').wait_for(state="attached")
    press("r")
    watched.shows("#facts", "seed 4")
    press("t")
    page.locator("body[data-taken]").wait_for()
    for keys, action in (
        (("ArrowRight", "z", "x"), "right+A+B"),
        (("ArrowLeft",), "left"),
        (("a",), "A"),
        ((), "noop"),
    ):
        for key in keys:
            page.keyboard.down(key)
        before = session.episode.decisions
        press("n")
        watched.shows("#facts", f"decision {before + 1} ")
        assert NAMES[session.steps.action[0]] == action
        watched.shows("#game-note", f"you: {action} ")
        for key in keys:
            page.keyboard.up(key)
    assert page.locator("#bars li").count() == 7
    press("d")
    watched.shows("#mind-title", "The dream")
    press("Escape")
    watched.shows("#mind-title", "What the model sees")
    press("Escape")
    page.locator("body:not([data-taken])").wait_for()
    press("?")
    page.locator("#shortcuts").wait_for()
    press("Escape")
    page.locator("#shortcuts").wait_for(state="hidden")
    reached = set()
    for _ in range(40):
        press("Tab")
        found = page.evaluate(
            "[document.activeElement.id || document.activeElement.value, document.activeElement.tagName]"
        )
        outline = page.evaluate("""() => { const at = document.activeElement;
            return getComputedStyle(at.type === 'radio' ? at.nextElementSibling : at).outlineStyle; }""")
        assert found[1] == "BODY" or outline == "solid", found
        reached.add(found[0])
    assert {
        "help",
        "screen",
        "run",
        "step",
        "next",
        "5",
        "sampled",
        "take",
        "dream",
        "models",
        "level",
        "seed",
    } <= reached


def test_the_dream_stepped_into_by_hand_and_left(watch):
    watched = watch()
    page, session = watched.page, watched.session
    watched.pause()
    watched.step()
    watched.shows("#ahead-note", "from here")
    before, screen = session.env.state_dict(), session.env.render()
    page.keyboard.press("d")
    watched.shows("#mind-title", "The dream")
    page.keyboard.press("t")
    page.locator("body[data-taken]").wait_for()
    page.keyboard.down("ArrowRight")
    for k in range(3):
        page.keyboard.press("n")
        watched.shows("#mind-note", f"decision {k + 1} ")
    page.keyboard.up("ArrowRight")
    assert session.env.state_dict()["actions"] == before["actions"] + [NAMES.index("right")] * 3
    assert_shown(watched, "#model", session.dream.thoughts.image[0])
    assert_shown(watched, "#screen", session.env.render())
    page.keyboard.press("d")
    watched.shows("#mind-title", "What the model sees")
    assert session.env.state_dict() == before
    assert_shown(watched, "#screen", screen)


def test_a_dropped_connection_comes_back_paused_with_nothing_lost(watch):
    watched = watch()
    watched.state("running")
    watched.page.keyboard.press("r")
    watched.shows("#episodes", "stopped")
    watched.served.drop()
    watched.state("paused")
    session = watched.session
    at = session.episode.decisions, session.episode.seed, len(session.history)
    watched.shows("#facts", f"seed 4 · decision {at[0]} ")
    assert watched.page.locator("#banner").is_hidden()
    assert watched.page.locator("#episodes tr").count() == 1
    assert (session.episode.decisions, session.episode.seed, len(session.history)) == at
    watched.step()


def test_a_second_tab_takes_over_and_the_first_can_take_it_back(watch):
    first = watch()
    first.pause()
    second = watch()
    first.state("moved")
    first.shows("#banner", "Another page")
    second.step()
    first.page.get_by_text("Take it back").click()
    first.state("paused")
    second.state("moved")


def test_it_fits_a_phone_and_a_thumb_can_play(watch):
    watched = watch(width=390, height=844, has_touch=True, color_scheme="dark", reduced_motion="reduce")
    page, session = watched.page, watched.session
    watched.pause()
    page.tap("#take")
    page.locator("#pad").wait_for()
    box = page.locator("#pad button", has_text="→").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    watched.step()
    page.mouse.up()
    assert NAMES[session.steps.action[0]] == "right"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.tap("#dream")
    watched.shows("#mind-title", "The dream")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
