"""`mario play --web`: the session plays as evaluation does, the dream is the model's own, the page shows and steers it.

The page is looked at in a real browser, served by the real server with the real game; the agent is small and untrained.
"""

import asyncio
import base64
import dataclasses
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from agents import CPU, small_agent
from clones import copy
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from dreamer import checkpoint
from dreamer.checkpoint import CheckpointError, load_agent
from dreamer.config import ConfigError, EnvConfig
from dreamer.mario import make_env
from dreamer.rollout import play_episodes
from stages import params
from stages.live import models, server
from stages.live.errors import LiveError
from stages.live.hands import NAMES, Hands, action_of
from stages.live.messages import pack, unpack
from stages.live.mind import Mind
from stages.live.session import AHEAD, Session
from stages.live.stage import Stage

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 60_000  # milliseconds, on a busy machine
ROOT = Path(__file__).parents[1]


def config(level: str = "1-1", time_limit: int = 20) -> EnvConfig:
    env = params.load(ROOT / "params.yaml").env.to_dict()
    return EnvConfig.from_dict({**env, "level": level, "time_limit": time_limit}).for_evaluation()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two untrained agents."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("one.pt", "two.pt")):
        torch.manual_seed(seed)
        checkpoint.save(folder / name, checkpoint.agent_state(small_agent()))
    return folder


@pytest.fixture
def new_session(checkpoints):
    made = []

    def new(time_limit: int = 20, seed: int = 3, greedy: bool = False) -> Session:
        made.append(
            Session(
                lambda name: load_agent(checkpoints / name, CPU),
                lambda level: make_env(config(level, time_limit)),
                *("one.pt", "1-1", seed, greedy),
            )
        )
        return made[-1]

    yield new
    for session in made:
        session.close()


# The session


@pytest.mark.parametrize("greedy", [False, True])
def test_the_session_plays_exactly_as_evaluation_does_whatever_is_looked_at_meanwhile(new_session, checkpoints, greedy):
    expected = []
    policy = load_agent(checkpoints / "one.pt", CPU).policy(greedy)
    torch.manual_seed(3)
    watch = lambda seed, env, steps: expected.append((seed, steps.copy(), env.render()))  # noqa: E731
    list(play_episodes([make_env(config())], policy, [3, 4], watch))

    session = new_session(greedy=greedy)
    for k, (seed, steps, screen) in enumerate(expected):
        if k:
            session.step()
        assert session.episode.seed == seed
        for field in dataclasses.fields(steps):
            np.testing.assert_array_equal(getattr(session.steps, field.name), getattr(steps, field.name))
        numbers, pictures = session.view()
        np.testing.assert_array_equal(pictures["screen"], screen)
        np.testing.assert_array_equal(pictures["sees"], steps.obs[0])
        if k % 10 == 2:
            session.look_ahead()
        if k % 10 == 5:
            session.enter_dream()
            for _ in range(3):
                session.step()
            session.leave_dream()
            again, _ = session.view()
            assert {**again, "row": None} == {**numbers, "row": None}
    assert [row["seed"] for row in session.episodes] == [3, 4]
    assert [row["by"] for row in session.episodes] == ["greedy" if greedy else "sampled"] * 2


@pytest.mark.parametrize("steps", [1, AHEAD])
def test_what_is_dreamt_ahead_is_the_imagination_that_the_agent_learns_in(new_session, steps):
    session = new_session()
    for _ in range(5):
        session.step()
    agent, state = session.agent, session.policy.state
    generator = torch.Generator().manual_seed(11)
    uniform_action = torch.rand(steps, 1, generator=generator)
    uniform_state = torch.rand(steps, 1, agent.config.model.stoch, generator=generator)
    with torch.no_grad():
        states, actions, _ = agent.actor_critic.imagine(
            agent.world_model.constant_rssm(), state, uniform_action, uniform_state, constant=True
        )
    mind = Mind(agent, seed=11)
    dreamt, dreamt_actions = mind.imagine(state, int(actions[0].argmax()), steps, greedy=False)
    np.testing.assert_array_equal(dreamt_actions, actions[:, 0].argmax(-1))
    assert torch.equal(dreamt.index, states.index[1:, 0])
    torch.testing.assert_close(dreamt.deter, states.deter[1:, 0], rtol=1e-5, atol=1e-6)
    thoughts = mind.think(dreamt)
    with torch.no_grad():
        reward = agent.world_model.reward(states.map(lambda part: part[1:, 0])).mean()
        goes_on = torch.sigmoid(agent.world_model.continue_logit(states.map(lambda part: part[1:, 0])))
    np.testing.assert_allclose(thoughts.reward, reward, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(thoughts.goes_on, goes_on, rtol=1e-4, atol=1e-5)


def test_the_dream_is_the_world_model_s_and_the_real_game_answers_the_same_actions(new_session):
    session = new_session()
    for _ in range(4):
        session.step()
    before, screen = session.env.state_dict(), session.env.render()
    twin = make_env(config())
    twin.load_state_dict(before)
    same = Mind(session.agent, seed=3)  # draws what the session's does
    state, action = session.policy.state, session.action
    session.enter_dream()
    for k in range(6):
        session.step()
        state = same.step(state, action)
        np.testing.assert_array_equal(session.dream.thoughts.image, same.think(state).image)
        action = same.choose(state, greedy=False)
        assert (session.dream.action, session.dream.decisions) == (action, k + 1)
    for done in session.env.state_dict()["actions"][len(before["actions"]) :]:
        obs, *_ = twin.step(done)
    numbers, pictures = session.view()
    assert numbers["mode"] == "dream"
    np.testing.assert_array_equal(pictures["screen"], twin.render())
    np.testing.assert_array_equal(pictures["sees"], obs)
    np.testing.assert_array_equal(pictures["model"], session.dream.thoughts.image[0])
    session.leave_dream()
    assert session.env.state_dict() == before
    np.testing.assert_array_equal(session.env.render(), screen)
    assert session.view()[0]["mode"] == "game"


def test_a_dream_outlives_the_real_game_but_does_not_begin_after_it(new_session):
    session = new_session(time_limit=3)
    session.enter_dream()
    for _ in range(5):
        session.step()
    assert session.dream.over
    assert session.dream.info["outcome"] == "time limit"
    assert session.view()[0]["row"]["real_reward"] is None
    session.leave_dream()
    for _ in range(3):
        session.step()
    assert session.steps.is_last[0]
    with pytest.raises(LiveError, match="the episode is over"):
        session.enter_dream()
    session.step()
    session.enter_dream()
    assert session.dream


def test_hands_play_in_the_game_and_in_the_dream_and_the_agent_remembers_what_they_did(new_session):
    session = new_session()
    session.step()
    session.hands.take(True)
    session.hands.hold(["right", "B"])
    session.step()
    right_b = NAMES.index("right+B")
    assert session.env.state_dict()["actions"][-1] == right_b
    assert session.steps.action[0] == right_b
    assert len(session.thoughts.probs[0]) == 7  # the agent's opinion goes on
    session.enter_dream()
    session.hands.hold(["left"])
    session.step()
    assert session.env.state_dict()["actions"][-1] == NAMES.index("left")
    session.leave_dream()
    while not session.ended:
        session.step()
    assert session.episodes[-1]["by"] == "sampled + you"


@pytest.mark.parametrize(
    ("buttons", "action"),
    [
        ([], "noop"),
        (["right"], "right"),
        (["right", "A"], "right+A"),
        (["B", "right"], "right+B"),
        (["A", "B", "right"], "right+A+B"),
        (["A"], "A"),
        (["A", "B"], "A"),
        (["B"], "noop"),
        (["left", "A", "B"], "left"),
        (["left", "right"], "right"),
    ],
)
def test_buttons_become_the_nearest_of_the_seven_actions(buttons, action):
    assert NAMES[action_of(buttons)] == action


def test_a_tap_between_two_decisions_is_not_lost_and_counts_once():
    hands = Hands()
    hands.hold(["A"])
    hands.hold([])
    assert NAMES[hands.action()] == "A"
    assert NAMES[hands.action()] == "noop"
    with pytest.raises(LiveError, match="Start: no such button"):
        hands.hold(["Start"])


def test_another_model_plays_the_same_start_and_one_that_is_not_there_changes_nothing(new_session):
    session = new_session()
    for _ in range(3):
        session.step()
    with pytest.raises(CheckpointError, match=r"three\.pt"):
        session.pick("three.pt")
    assert (session.model, session.episode.decisions) == ("one.pt", 3)
    session.pick("two.pt")
    assert (session.model, session.episode.seed, session.episode.decisions) == ("two.pt", 3, 0)
    assert [(row["model"], row["outcome"]) for row in session.episodes] == [("one.pt", "stopped")]


def test_what_is_asked_for_and_cannot_be_is_refused_before_anything_changes(new_session):
    session = new_session()
    session.step()
    with pytest.raises(LiveError, match="seed -1"):
        session.begin(-1)
    with pytest.raises(ConfigError, match="level"):
        session.begin(1, "9-1")
    assert (session.episode.decisions, session.level, len(session.episodes)) == (1, "1-1", 0)
    session.begin(7, "1-2")
    assert (session.episode.seed, session.level) == (7, "1-2")


def test_messages_come_back_as_they_were():
    pictures = {"a": np.arange(24, dtype=np.uint8).reshape(2, 4, 3), "b": np.ones((5, 1, 1, 3), np.uint8)}
    numbers, again = unpack(pack({"x": 1.5, "name": "ö"}, pictures))
    assert numbers == {"x": 1.5, "name": "ö"}
    assert again.keys() == pictures.keys()
    for name, picture in pictures.items():
        np.testing.assert_array_equal(again[name], picture)


# The server


class Served:
    """A stage that is served by a thread of this process."""

    def __init__(self, session: Session):
        async def known():
            return [{"name": name, "about": "checkpoint"} for name in ("one.pt", "two.pt", "three.pt")]

        self.stage = Stage(session, known)
        self.socket = server.bind(0)
        self.host = "{}:{}".format(*self.socket.getsockname())
        self.url = f"http://{self.host}/"
        self.uvicorn = uvicorn.Server(server.configuration(self.stage))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def client(self, origin: str | None = None, **options):
        return connect(f"ws://{self.host}/session", origin=origin or self.url.rstrip("/"), **options)

    def drop(self) -> None:
        """Cuts the page's connection off."""
        closing = self.stage.page.socket.close(1011)
        asyncio.run_coroutine_threadsafe(closing, self.uvicorn.servers[0].get_loop()).result(30)

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()


@pytest.fixture
def served(new_session):
    served = Served(new_session(time_limit=2000))
    yield served
    served.stop()


def views(client, wanted: int, timeout: float = 30.0) -> list[dict]:
    """The numbers of so many views."""
    found = []
    while len(found) < wanted:
        message = client.recv(timeout=timeout)
        if isinstance(message, bytes) and "film" not in (numbers := unpack(message)[0]):
            found.append(numbers)
    return found


def say(client, **command) -> None:
    client.send(json.dumps(command))


def until(client, key: str):
    """The next note with this key."""
    while True:
        message = client.recv(timeout=60)
        if isinstance(message, str) and key in (note := json.loads(message)):
            return note[key]


def test_the_game_waits_for_a_page_that_does_not_draw(served):
    with served.client() as client:
        first, second = views(client, 2)
        assert second["decisions"] == first["decisions"] + 1
        with pytest.raises(TimeoutError):
            views(client, 2, timeout=2)
        stopped_at = served.stage.session.episode.decisions
        assert stopped_at <= 3
        for k in range(2, 12):
            say(client, do="seen", value=k)
            (view,) = views(client, 1)
        assert stopped_at < view["decisions"] <= 13


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_other_sites_cannot_drive_it(served, origin):
    with pytest.raises(InvalidStatus, match="403"), served.client(origin):
        pass
    assert served.stage.session.episode.decisions == 0


def test_a_name_that_leads_to_loopback_is_refused(served):
    with socket.create_connection(served.socket.getsockname()) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: rebound.example\r\nConnection: close\r\n\r\n")
        assert b"400" in raw.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize(
    ("sent", "part"),
    [
        ('{"do": "fly"}', "fly"),
        ("nonsense", "not a command"),
        ("{not json", "not a command"),
        ('{"do": "speed", "value": 16}', "speed"),
        ('{"do": "hold", "value": ["Start"]}', "Start: no such button"),
        ('{"do": "pick", "value": "three.pt"}', "three.pt"),
        ('{"do": "begin", "seed": 1, "level": "1-9"}', "1-9"),
        ('{"do": "begin", "seed": -4, "level": "1-1"}', "seed -4"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_and_the_session_goes_on(served, sent, part):
    with served.client() as client:
        say(client, do="run", value=False)
        client.send(sent)
        error = until(client, "error")
        assert part in error
        assert "\n" not in error
        before = served.stage.session.episode.decisions
        say(client, do="seen", value=99)
        say(client, do="step")
        while views(client, 1)[0]["decisions"] != before + 1:
            pass
        assert served.stage.session.model == "one.pt"


def test_the_latest_page_has_the_stage_and_the_one_before_is_told(served):
    with served.client() as first:
        views(first, 1)
        with served.client() as second:
            views(second, 1)
            with pytest.raises(ConnectionClosed) as closed:
                views(first, 100)
            assert closed.value.rcvd.code == 4001
            say(second, do="run", value=False)
            say(second, do="step")
            while views(second, 1)[0]["running"]:
                pass


def test_a_port_that_is_taken_is_named():
    with server.bind(0) as taken, pytest.raises(LiveError, match=r"--port \d+: taken; name another one"):
        server.bind(taken.getsockname()[1])


def test_models_are_the_one_asked_for_and_the_checkpoints_and_looking_makes_no_registry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.pt").touch()
    assert asyncio.run(models.known("3")) == [
        {"name": "3", "about": "as started"},
        {"name": "checkpoints/best.pt", "about": "checkpoint"},
    ]
    assert not (tmp_path / "none.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense")
    told = asyncio.run(models.known("checkpoints/best.pt"))
    assert [each["name"] for each in told] == ["", "checkpoints/best.pt"]
    assert "MLFLOW_TRACKING_URI=nonsense" in told[0]["about"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory, checkpoints):
    root = copy(tmp_path_factory.mktemp("tree"))
    (root / "checkpoints").mkdir()
    (root / "checkpoints/best.pt").write_bytes((checkpoints / "one.pt").read_bytes())
    return root


def start(tree: Path, *arguments: str) -> subprocess.Popen:
    command = (sys.executable, "-m", "stages", "play", "--web", *arguments)
    return subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_says_where_it_is_and_ctrl_c_ends_it_with_a_page_open(tree):
    with start(tree, "--port", "0") as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"level 1-1: live on http://(127\.0\.0\.1:\d+)/ ", line)
            assert found, process.stderr.read()
            host = found[1]
            with connect(f"ws://{host}/session", origin=f"http://{host}") as client:
                views(client, 1)
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 130
                assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["--model", "nowhere/best.pt"], "no such checkpoint"), (["--level", "1-9"], "1-9")],
)
def test_what_is_wrong_at_the_start_is_one_line(tree, arguments, part):
    with start(tree, "--port", "0", *arguments) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    line = errors.splitlines()[0]
    assert line.startswith("error: ")
    assert part in line


# The page


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

    def decision(self, number: int) -> None:
        self.shows("#facts", f"decision {number} ")


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
    watched.page.keyboard.press("n")
    session = watched.session
    watched.shows("#ahead-note", "from here")
    watched.decision(session.episode.decisions)
    numbers, pictures = session.view()
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
    watched.decision(before + 1)
    page.get_by_text("30", exact=True).click()
    page.locator('#speeds input[value="30"]:checked').wait_for(state="attached")
    assert stage.speed == 30
    page.get_by_text("greedy", exact=True).click()
    page.locator('#modes input[value="greedy"]:checked').wait_for(state="attached")
    page.click("#step")
    watched.decision(before + 2)
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
        watched.decision(before + 1)
        assert NAMES[session.steps.action[0]] == action
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
    page.keyboard.press("n")
    watched.shows("#ahead-note", "from here")
    watched.decision(session.episode.decisions)
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
    watched.page.keyboard.press("n")
    watched.decision(at[0] + 1)


def test_a_second_tab_takes_over_and_the_first_can_take_it_back(watch):
    first = watch()
    first.pause()
    second = watch()
    first.state("moved")
    first.shows("#banner", "Another page")
    second.page.keyboard.press("n")
    second.decision(second.session.episode.decisions)
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
    before = session.episode.decisions
    page.keyboard.press("n")
    watched.decision(before + 1)
    page.mouse.up()
    assert NAMES[session.steps.action[0]] == "right"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.tap("#dream")
    watched.shows("#mind-title", "The dream")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
