"""A trained agent as a directory that plays anywhere: weights.safetensors, config.json and card.md.

config.json holds the SHA-256 of the weights, so whoever knows the hash of config.json knows both. Registered models and
agents that ship with the repository have this one format.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from stages import digest

WEIGHTS, CONFIG, CARD = "weights.safetensors", "config.json", "card.md"
FORMAT = 1
SLOW = "actor_critic.slow_critic."


class BundleError(ValueError):
    """A bundle is incomplete, damaged or not the one that it says it is. The message names it and the remedy."""


def write(
    directory: Path,
    state: dict[str, Any],
    env: dict[str, Any],
    lineage: dict[str, Any] | None = None,
    card: str = "A DreamerV3 agent that plays Super Mario Bros from pixels.\n",
    half: bool = False,
) -> Path:
    """Makes the directory anew.

    Args:
        state: of a checkpoint: agent, actions, weights; frames and score where known
        env: the game that it was trained for, as `EnvConfig.to_dict`
        half: weights in 16 bits, without the slow critic, which only learning needs: half the size, to be evaluated
            as it is
    """
    import torch
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous() for name, tensor in state["weights"].items()}
    if half:
        weights = {
            name: tensor.half() if tensor.dtype == torch.float32 else tensor
            for name, tensor in weights.items()
            if not name.startswith(SLOW)
        }
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    save_file(weights, directory / WEIGHTS)
    config = {
        "format": FORMAT,
        "weights_sha256": digest.sha256(directory / WEIGHTS),
        "actions": state["actions"],
        "frames": state.get("frames"),
        "score": state.get("score"),
        "agent": state["agent"],
        "env": env,
        "lineage": lineage or {},
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (directory / CARD).write_text(card)
    return directory


def find(path: Path) -> Path | None:
    """The bundle in a directory: itself, or that of an MLflow model's directory; None where there is none."""
    if (path / CONFIG).exists():
        return path
    inside = sorted(path.glob(f"artifacts/*/{CONFIG}"))
    return inside[0].parent if inside else None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, after the weights beside it proved to be those it was written with.

    Raises:
        BundleError: they are not, or a file is missing or damaged
    """
    try:
        config = json.loads((directory / CONFIG).read_text())
        known = config["format"]
        if known != FORMAT:
            raise BundleError(f"{directory}: a bundle of format {known}, this version reads {FORMAT}; update it")
        if digest.sha256(directory / WEIGHTS) != config["weights_sha256"]:
            raise BundleError(
                f"{directory / WEIGHTS}: not the weights that {CONFIG} was written with (their SHA-256 differs); "
                "fetch the model again"
            )
    except FileNotFoundError as error:
        raise BundleError(f"{error.filename}: missing from the bundle; fetch the model again") from None
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{directory / CONFIG}: damaged ({error}); fetch the model again") from None
    return config


def load(directory: Path) -> dict[str, Any]:
    """What `write` was given as state, with weights of 32 bits.

    Raises:
        BundleError: it is damaged, or its weights are no numbers
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(directory)
    try:
        weights = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise BundleError(f"{directory / WEIGHTS}: damaged ({error}); fetch the model again") from None
    weights = {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in weights.items()}
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise BundleError(f"{directory / WEIGHTS}: {bad[0]} holds values that are no numbers; train anew")
    if not any(name.startswith(SLOW) for name in weights):
        weights |= {
            name.replace(".critic.", ".slow_critic.", 1): tensor
            for name, tensor in weights.items()
            if name.startswith("actor_critic.critic.")
        }
    return {**{key: config[key] for key in ("agent", "actions", "frames", "score")}, "weights": weights}
