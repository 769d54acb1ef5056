"""The only reader of params.yaml: the profile laid over the defaults, typed and checked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dreamer.config import (
    AgentConfig,
    ArchiveConfig,
    BehaviorConfig,
    ComputeConfig,
    Config,
    ConfigError,
    EnvConfig,
    LossConfig,
    ModelConfig,
    OptimizersConfig,
    ReplayConfig,
    TrainingConfig,
    below,
    outside,
)

PATH = Path("params.yaml")


@dataclass(frozen=True)
class CollectParams(Config):
    steps: int
    envs: int
    probabilities: tuple[float, ...]

    def problems(self):
        if len(self.probabilities) != 7 or min(self.probabilities) < 0 or sum(self.probabilities) <= 0:
            yield "probabilities", "must be seven numbers, none negative, not all zero"
        yield from below(self, 1, "steps", "envs")


@dataclass(frozen=True)
class TrainParams(TrainingConfig):
    eval_every: int
    eval_episodes: int
    eval_seed: int
    checkpoint_every: int
    checkpoint_minutes: float
    log_every: int
    video_pred_log: bool

    def problems(self):
        yield from super().problems()
        if self.checkpoint_minutes <= 0:
            yield "checkpoint_minutes", f"must be positive, is {self.checkpoint_minutes}"
        yield from below(self, 1, "eval_every", "eval_episodes", "checkpoint_every", "log_every")
        yield from below(self, 0, "eval_seed")


@dataclass(frozen=True)
class EvaluateParams(Config):
    episodes: int
    envs: int
    seed: int

    def problems(self):
        yield from below(self, 1, "episodes", "envs")
        yield from below(self, 0, "seed")


@dataclass(frozen=True)
class RenderParams(Config):
    episodes: int
    fps: int
    sequences: int
    context: int

    def problems(self):
        yield from below(self, 1, "episodes", "sequences", "context")
        yield from outside(self, 1, 50, "fps")  # what players of GIFs keep up with


@dataclass(frozen=True)
class PromoteParams(Config):
    episodes: int
    envs: int
    seed: int
    confidence: float
    clear_rate_min: float
    return_min: float
    automatic: bool

    def problems(self):
        yield from below(self, 100, "episodes")  # fewer tell little of a rate
        yield from below(self, 1, "envs")
        yield from below(self, 0, "seed")
        yield from outside(self, 0.5, 0.9999, "confidence")
        yield from outside(self, 0.0, 1.0, "clear_rate_min")


@dataclass(frozen=True)
class Params(Config):
    """params.yaml with the profile applied."""

    seed: int
    env: EnvConfig
    collect: CollectParams
    archive: ArchiveConfig
    replay: ReplayConfig
    model: ModelConfig
    losses: LossConfig
    behavior: BehaviorConfig
    optimizers: OptimizersConfig
    compute: ComputeConfig
    train: TrainParams
    evaluate: EvaluateParams
    render: RenderParams
    promote: PromoteParams
    profile: str = field(kw_only=True)

    @property
    def agent(self) -> AgentConfig:
        return AgentConfig(self.model, self.losses, self.behavior, self.optimizers)

    def problems(self):
        yield from below(self, 0, "seed")
        if self.train.steps < self.collect.steps:
            yield "train.steps", f"must be at least collect.steps ({self.collect.steps}), is {self.train.steps}"
        elif self.collect.steps // self.env.action_repeat // self.collect.envs < self.train.batch_length:
            yield "collect.steps", f"an emulator gets less than train.batch_length ({self.train.batch_length}) steps"
        chosen = range(self.train.eval_seed, self.train.eval_seed + self.train.eval_episodes)
        reported = range(self.evaluate.seed, self.evaluate.seed + self.evaluate.episodes)
        judged = range(self.promote.seed, self.promote.seed + self.promote.episodes)
        if _overlap(chosen, reported):
            yield "train.eval_seed", "overlaps evaluate.seed: starts that choose a checkpoint are not reported"
        if _overlap(judged, chosen) or _overlap(judged, reported):
            yield "promote.seed", "overlaps train.eval_seed or evaluate.seed: promotion has starts of its own"


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def load(path: Path = PATH, profile: str | None = None) -> Params:
    """Reads, merges and checks the parameters, of the profile in force or of another.

    Raises:
        ConfigError: the file is missing or no YAML, the profile is unknown, or a parameter is wrong; one line
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; run from the repository's root") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML, {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping")
    values.pop("runner", None)  # the pipeline's, see pipeline/settings.py
    profiles = values.pop("profiles", None)
    if not isinstance(profiles, dict):
        raise ConfigError("profiles: missing parameter; add it to params.yaml")
    profile = values["profile"] = profile or values.get("profile")
    if not isinstance(profile, str) or profile not in profiles:
        raise ConfigError(f"profile: unknown profile {profile!r}; known: {', '.join(map(str, profiles))}")
    Params.from_dict(values)  # the defaults, too, where the profile hides a mistake in them
    return Params.from_dict(_overlay(values, profiles[profile] or {}, f"profiles.{profile}"))


def _overlay(defaults: dict[str, Any], changes: Any, path: str) -> dict[str, Any]:
    if not isinstance(changes, dict):
        raise ConfigError(f"{path}: expected a mapping, got {changes!r}")
    merged = dict(defaults)
    for key, value in changes.items():
        if key not in defaults:
            raise ConfigError(f"{path}.{key}: unknown parameter; known here: {', '.join(map(str, defaults))}")
        merged[key] = _overlay(defaults[key], value, f"{path}.{key}") if isinstance(defaults[key], dict) else value
    return merged
