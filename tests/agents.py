"""A small agent for tests, and settings to vary."""

from typing import Any

import numpy as np
import torch

from dreamer.agent import Agent
from dreamer.config import AgentConfig, ComputeConfig
from dreamer.replay import Batch
from dreamer.rollout import NO_ACTION

CPU = ComputeConfig(device="cpu", precision="float32", compile=False)


def agent_config(**changes: dict[str, Any]) -> AgentConfig:
    """Groups to change by keyword: agent_config(model={"deter": 8})."""
    adam = {"eps": 1e-8, "grad_clip": 100.0}
    groups = {
        "model": {
            **{"deter": 64, "stoch": 8, "classes": 8, "hidden": 64, "depth": 4, "units": 64, "layers": 2},
            **{"buckets": "symlog", "initial": "learned", "unimix_ratio": 0.01, "posterior_scale": 1.0},
        },
        "losses": {
            "free_nats": 0.6,
            "dyn_scale": 0.5,
            "rep_scale": 0.1,
            "image_focus": 0.0,
            "reward_scale": 1.0,
            "continue_scale": 1.0,
        },
        "behavior": {
            **{
                "model_average": 0.0,
                "imag_horizon": 10,
                "imag_starts": 0,
                "imag_gradient": "reinforce",
                "imag_gradient_mix": 0.5,
            },
            **{
                "discount": 0.97,
                "discount_lambda": 0.95,
                "entropy": 3e-3,
                "entropy_final": None,
                "entropy_decay": 1.0,
                "unimix_ratio": 0.01,
                "normalize": "returns",
                "return_decay": 0.99,
            },
            **{"slow_target": True, "slow_target_update": 1, "slow_target_fraction": 0.02},
        },
        "optimizers": {
            **{"model": {"lr": 1e-3, **adam}, "actor": {"lr": 3e-4, **adam}, "critic": {"lr": 1e-3, **adam}},
            "lr_decay": 0.0,
        },
    }
    return AgentConfig.from_dict({name: {**group, **changes.get(name, {})} for name, group in groups.items()})


def small_agent(compute: ComputeConfig = CPU, **changes: dict[str, Any]) -> Agent:
    return Agent(agent_config(**changes), compute, actions=7)


def pressing(button: int, share: float = 20.0) -> Agent:
    """An agent that always presses one button (an index into `dreamer.mario.ACTIONS`), all but for unimix."""
    agent = small_agent()
    output = agent.actor_critic.actor.output
    with torch.no_grad():
        output.weight.zero_()
        output.bias.zero_()
        output.bias[button] = share
    return agent


def random_batch(batch: int = 4, length: int = 8, seed: int = 0) -> Batch:
    """Smooth random images, so that there is something to fit; an episode begins inside each sequence."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (batch, length, 4, 4, 3), dtype=np.uint8)
    is_first = np.zeros((batch, length), bool)
    is_first[:, length // 2] = True
    is_last = np.roll(is_first, -1, axis=1)
    action = np.where(is_first, NO_ACTION, rng.integers(0, 7, (batch, length)))
    reward = rng.choice([-15.0, 0.0, 8.0, 1000.0], (batch, length)).astype(np.float32)
    return Batch(coarse.repeat(16, 2).repeat(16, 3), action, reward, is_first, is_last, is_last.copy())
