"""The real game: observation, reward, ends of episodes, starts and resuming."""

import dataclasses

import gymnasium.utils.env_checker
import numpy as np
import pytest
from gym_super_mario_bros import SuperMarioBrosEnv

from dreamer.config import ConfigError, EnvConfig
from dreamer.mario import ACTIONS, SCREEN, Camera, make_env, rom_sha256

CONFIG = EnvConfig.from_dict(
    {
        "level": "1-1",
        "action_repeat": 4,
        "noop_max": 30,
        "time_limit": 2000,
        "stall_limit": 0,
        "reward": {"progress": 1.0, "flag": 1000.0, "clock": 0.5, "death": 15.0},
    }
)
NAMES = list(ACTIONS)
RUN, RUN_JUMP, NOOP = NAMES.index("right+B"), NAMES.index("right+A+B"), NAMES.index("noop")

# A way through 1-1 from the start without no-ops, found by a search over save states: run and jump take turns for so
# many decisions.
TURNS = [
    7,
    7,
    11,
    6,
    4,
    8,
    8,
    7,
    8,
    6,
    9,
    8,
    11,
    8,
    10,
    7,
    10,
    8,
    11,
    7,
    7,
    8,
    10,
    8,
    10,
    4,
    4,
    6,
    10,
    8,
    11,
    8,
    6,
    5,
    8,
    8,
    8,
    3,
    4,
    3,
    1,
]
CLEAR = [action for k, turn in enumerate(TURNS) for action in [RUN_JUMP if k % 2 else RUN] * turn]


def play(env, actions):
    """Steps until the actions or the episode end: total reward and the last step's result."""
    total = 0.0
    for action in actions:
        _, reward, terminated, truncated, info = env.step(action)
        total += reward
        if terminated or truncated:
            break
    return total, terminated, truncated, info


@pytest.fixture
def env():
    env = make_env(CONFIG)
    yield env
    env.close()


def test_is_a_gymnasium_environment(env):
    gymnasium.utils.env_checker.check_env(env, skip_render_check=True)


def test_actions_are_the_documents_seven_in_its_order():
    assert NAMES == ["noop", "right", "right+A", "right+B", "right+A+B", "A", "left"]


def test_running_into_the_first_goomba_is_death(env):
    _, start = env.reset(options={"noops": 0})
    total, terminated, truncated, info = play(env, [RUN] * 200)
    assert terminated and not truncated
    assert info["outcome"] == "death" and not info["clear"]
    assert 250 < info["best_x"] < 350
    assert total == info["best_x"] - 40 - 0.5 * (start["clock"] - info["clock"]) - 15


def test_the_flag_is_terminal_and_pays(env):
    _, start = env.reset(options={"noops": 0})
    total, terminated, truncated, info = play(env, CLEAR)
    assert terminated and not truncated
    assert info["outcome"] == "flag" and info["clear"] and info["best_x"] == 3161
    assert len(env.state_dict()["actions"]) == len(CLEAR) == 301
    assert total == 3161 - 40 - 0.5 * (start["clock"] - info["clock"]) + 1000


def test_the_time_limit_truncates():
    env = make_env(dataclasses.replace(CONFIG, time_limit=20))
    env.reset(seed=1)
    results = [env.step(NOOP) for _ in range(20)]
    assert [truncated for *_, truncated, _ in results] == [False] * 19 + [True]
    assert not any(terminated for _, _, terminated, _, _ in results)
    assert results[-1][-1]["outcome"] == "time limit"


def test_a_stall_truncates_and_progress_puts_it_off():
    env = make_env(dataclasses.replace(CONFIG, stall_limit=10))
    env.reset(seed=1)
    for action in [NOOP] * 8 + [RUN] * 3:
        assert not env.step(action)[3]
    while env.step(NAMES.index("left"))[4]["x"] >= env._best_x:
        pass
    outcomes = [env.step(NOOP)[4]["outcome"] for _ in range(9)]
    assert outcomes.count("stall") == 1 and outcomes[:7] == [None] * 7


def test_turning_back_and_forth_earns_nothing():
    env = make_env(dataclasses.replace(CONFIG, reward=dataclasses.replace(CONFIG.reward, clock=0.0)))
    env.reset(options={"noops": 0})
    left = NAMES.index("left")
    steps = [*[RUN] * 10, *[left] * 15, *[RUN] * 8, *[left] * 15, *[RUN] * 8]
    total, terminated, *_, info = play(env, steps)
    assert not terminated and info["x"] < info["best_x"]
    assert total == info["best_x"] - 40


def test_same_seed_same_start_and_starts_differ(env):
    first, _ = env.reset(seed=5)
    again, _ = env.reset(seed=5)
    assert (first == again).all()
    noops = set()
    for seed in range(40):
        env.reset(seed=seed)
        noops.add(env.state_dict()["noops"])
    assert min(noops) >= 0 and max(noops) <= 30 and len(noops) > 15


def test_an_episode_goes_on_from_its_state(env):
    rng = np.random.default_rng(3)
    env.reset(seed=9)
    for action in rng.choice([RUN_JUMP, RUN, 1], 40):
        env.step(int(action))
    other = make_env(CONFIG)
    other.load_state_dict(env.state_dict())
    for action in rng.choice([RUN_JUMP, 1], 10):
        one, two = env.step(int(action)), other.step(int(action))
        assert (one[0] == two[0]).all() and one[1:] == two[1:]
        if one[2]:
            break


def area_average(first, second):
    """Of the maximum of two (240, 256, 3) screens, in integers."""
    quarters = np.repeat(np.maximum(first, second).astype(int), 4, axis=0).reshape(64, 15, 64, 4, 3)
    return (quarters.sum((1, 3)) + 30) // 60


def test_a_picture_is_the_exact_area_average_of_the_maximum():
    def rgb(words):
        return np.stack([words >> shift & 255 for shift in (16, 8, 0)], -1)

    screen = np.zeros(SCREEN[:2], np.uint32)
    camera, white = Camera(screen), np.full(SCREEN[:2], 0xFFFFFF, np.uint32)
    noise = np.random.default_rng(0).integers(0, 2**24, (3, *SCREEN[:2]), dtype=np.uint32)
    for first, second in [(white, noise[0]), (noise[1], noise[2]), (noise[0], white * 0), (white * 0, white * 0)]:
        screen[:] = first
        camera.keep()
        screen[:] = second
        assert (camera.picture() == area_average(rgb(first), rgb(second))).all()


RARE = {  # what bytes of the game's memory bring about before some decisions
    20: {0x06DE: 90},  # a wait for another area
    50: {0x0770: 2},  # a castle's end
    70: {0x0E: 3},  # a way down a pipe
}


@pytest.mark.parametrize(("level", "rare"), [("1-1", RARE), ("4-4", {})])
def test_plays_as_the_game_s_own_environment_does(level, rare):
    """Decision by decision the same picture, position and memory, whatever a step leaves out to save time."""
    env = make_env(dataclasses.replace(CONFIG, level=level))
    game = SuperMarioBrosEnv(target=tuple(map(int, level.split("-"))))
    deaths, done = 0, True
    for k, action in enumerate(np.random.default_rng(5).choice(7, 90, p=[0.02, 0.05, 0.15, 0.3, 0.4, 0.03, 0.05])):
        if done:
            env.reset(options={"noops": 0})
            game.reset()
        for address, value in rare.get(k, {}).items():
            env._game.ram[address] = game.ram[address] = value
        obs, _, terminated, _, info = env.step(action)
        for _ in range(4):
            before = game.screen.copy()
            _, _, done, _, theirs = game.step(list(ACTIONS.values())[action])
            if done:
                break
        assert (obs == area_average(before, game.screen)).all()
        assert (terminated, info["x"], info["clear"]) == (done, theirs["x_pos"], theirs["flag_get"])
        assert bytes(env._game.ram) == game.ram.tobytes()
        deaths += info["outcome"] == "death"
    assert deaths  # which end a decision before its last frame


def test_the_observation_is_the_screen(env):
    env.reset(seed=2)
    obs = env.step(NOOP)[0].astype(int)
    assert obs[20, 40, 2] > obs[20, 40, 0] + 50 and obs[62, 2, 0] > obs[62, 2, 2] + 50  # blue sky, brown ground
    assert env.render().shape == SCREEN


def test_a_finished_episode_cannot_go_on(env):
    env.reset(options={"noops": 0})
    play(env, [RUN] * 200)
    with pytest.raises(ValueError, match="reset"):
        env.step(RUN)


def test_unknown_level_is_named():
    with pytest.raises(ConfigError, match=r'level: must be "1-1" to "8-4", is \'9-1\''):
        EnvConfig.from_dict({**CONFIG.to_dict(), "level": "9-1"})


def test_rom_hash():
    assert len(rom_sha256()) == 64
