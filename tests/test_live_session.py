"""A live session plays as evaluation does, and its dream is the model's own."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from agents import CPU, small_agent
from live import config, open_session

from dreamer.checkpoint import CheckpointError, load_agent
from dreamer.config import ConfigError
from dreamer.mario import make_env
from dreamer.networks import State
from dreamer.rollout import play_episodes
from stages.live.errors import LiveError
from stages.live.hands import NAMES, Hands, action_of
from stages.live.messages import pack, unpack
from stages.live.mind import Mind
from stages.live.session import AHEAD
from stages.live.views import view


@pytest.fixture
def new_session(checkpoints):
    with contextlib.ExitStack() as opened:
        yield lambda **options: opened.enter_context(open_session(checkpoints, **options))


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
        numbers, pictures = view(session)
        np.testing.assert_array_equal(pictures["screen"], screen)
        np.testing.assert_array_equal(pictures["sees"], steps.obs[0])
        if k % 10 == 2:
            session.look_ahead()
        if k % 10 == 5:
            session.enter_dream()
            for _ in range(3):
                session.step()
            session.leave_dream()
            again, _ = view(session)
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
    numbers, pictures = view(session)
    assert numbers["mode"] == "dream"
    np.testing.assert_array_equal(pictures["screen"], twin.render())
    np.testing.assert_array_equal(pictures["sees"], obs)
    np.testing.assert_array_equal(pictures["model"], session.dream.thoughts.image[0])
    session.leave_dream()
    assert session.env.state_dict() == before
    np.testing.assert_array_equal(session.env.render(), screen)
    assert view(session)[0]["mode"] == "game"


def test_a_dream_outlives_the_real_game_but_does_not_begin_after_it(new_session):
    session = new_session(time_limit=3)
    session.enter_dream()
    for _ in range(5):
        session.step()
    assert session.dream.over
    assert session.dream.info["outcome"] == "time limit"
    assert view(session)[0]["row"]["real_reward"] is None
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


@pytest.mark.parametrize("buckets", ["symlog", "symexp"])
def test_the_value_shown_is_in_the_game_s_units_however_it_is_stored(buckets):
    agent = small_agent(model={"buckets": buckets})
    critic = agent.actor_critic.critic
    with torch.no_grad():
        critic.output.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    state = State(torch.randint(8, (3, 8), generator=generator), torch.randn(3, 64, generator=generator))
    shown = Mind(agent, 0).think(state).value
    with torch.no_grad():
        probs = torch.softmax(critic(state).double(), -1).numpy()
    edge = {"symlog": 20, "symexp": 10}[buckets]
    places = np.linspace(-edge, edge, 255)
    symexp = lambda x: np.sign(x) * np.expm1(np.abs(x))  # noqa: E731
    expected = symexp(probs @ places) if buckets == "symlog" else probs @ symexp(places)
    np.testing.assert_allclose(shown, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(expected).max() > 0.1
