"""Checkpoints: files of tensors and plain values that run no code when loaded, written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamer.agent import Agent
from dreamer.config import AgentConfig, ComputeConfig, ConfigError

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another architecture. The message names the file and the remedy."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts, lists and scalars with tensors or numpy arrays in them.

    To a temporary name, flushed to the disk, then renamed: a reader or a power cut never finds half a checkpoint.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(_plain({"format": FORMAT, **state}), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, with tensors on the CPU (arrays come back as tensors).

    Raises:
        CheckpointError: there is no such file, or it is damaged, or not a checkpoint of this project
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such checkpoint; train first (dvc repro train) or fetch it (dvc pull)"
        ) from None
    except Exception as error:  # torch raises a different type for every kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({reason[:120]}); restore it (dvc checkout --force)"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project, or of another format than {FORMAT}")
    return state


def load_agent(path: Path, compute: ComputeConfig, expected: AgentConfig | None = None) -> Agent:
    """The agent of a checkpoint, rebuilt from the file alone.

    Raises:
        CheckpointError: as `load`, or its settings differ from `expected` in the networks' architecture
    """
    return build_agent(load(path), compute, expected, path)


def build_agent(state: dict[str, Any], compute: ComputeConfig, expected: AgentConfig | None, path: Path) -> Agent:
    """`load_agent` of a checkpoint that is already read."""
    try:
        config = AgentConfig.from_dict(state["agent"])
    except (ConfigError, KeyError) as error:
        raise CheckpointError(
            f"{path}: its settings do not fit this version of the code ({error}); train anew"
        ) from None
    if expected is not None:
        for key in config.model.names():
            stored, wanted = getattr(config.model, key), getattr(expected.model, key)
            if stored != wanted:
                raise CheckpointError(
                    f"{path}: a checkpoint of another architecture, model.{key} is {stored} there and {wanted} in "
                    f"params.yaml; set it to {stored}, or train anew (dvc repro train)"
                )
    agent = Agent(config, compute, state["actions"])
    try:
        agent.load_state_dict(state["weights"])
    except RuntimeError as error:
        culprit = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path}: a checkpoint of another architecture ({culprit[:160]}); train anew") from None
    return agent.eval()


def agent_state(agent: Agent) -> dict[str, Any]:
    """What `load_agent` needs."""
    return {"agent": agent.config.to_dict(), "actions": agent.actions, "weights": agent.state_dict()}


def random_state() -> dict[str, Any]:
    """Of torch's generators, which the agent draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def load_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, Tensor) and value.nbytes != value.untyped_storage().nbytes():
        return value.clone()  # else torch writes all that it is a view of
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, np.generic):
        return value.item()
    return value
