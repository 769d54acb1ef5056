"""Every setting of the agent as frozen dataclasses. None has a default: params.yaml holds the numbers."""

import dataclasses
import math
import types
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A parameter is unknown, missing, of the wrong type or out of range. The message names it and the remedy."""


class Config:
    """Base of the dataclasses below: built from plain mappings, turned back into them."""

    @classmethod
    def from_dict(cls, values: Any, path: str = "") -> Self:
        """Build from a mapping whose keys are exactly the fields.

        Raises:
            ConfigError: a key is unknown or missing, or a value has the wrong type; names it as `path.key`.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{path or 'parameters'}: expected a mapping of {', '.join(cls.names())}, got {values!r}")
        prefix = f"{path}." if path else ""
        if unknown := [key for key in values if key not in cls.names()]:
            raise ConfigError(f"{prefix}{unknown[0]}: unknown parameter; known here: {', '.join(cls.names())}")
        if missing := [key for key in cls.names() if key not in values]:
            raise ConfigError(f"{prefix}{missing[0]}: missing parameter; add it to params.yaml")
        hints = get_type_hints(cls)
        config = cls(**{key: _typed(value, hints[key], f"{prefix}{key}") for key, value in values.items()})
        for key, message in config.problems():
            raise ConfigError(f"{prefix}{key}: {message}")
        return config

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`: nested plain dicts, lists and scalars."""
        return {
            key: value.to_dict() if isinstance(value, Config) else list(value) if isinstance(value, tuple) else value
            for key in self.names()
            for value in [getattr(self, key)]
        }

    def problems(self):
        """Yields (key, message) for values that have the right type but make no sense."""
        return ()


def _typed(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind`, or ConfigError. An int is accepted as a float (1 is 1.0), a bool never as a number."""
    if isinstance(kind, type) and issubclass(kind, Config):
        return kind.from_dict(value, path)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{path}: expected one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        return tuple(_typed(item, get_args(kind)[0], f"{path}[{index}]") for index, item in enumerate(value))
    if isinstance(kind, types.UnionType):
        return value if value is None else _typed(value, get_args(kind)[0], path)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        if not math.isfinite(value):
            raise ConfigError(f"{path}: expected a finite number, got {value!r}")
        return float(value)
    if type(value) is not kind:
        hint = f" (write {float(value)!r} without quotes)" if kind is float and _is_number(value) else ""
        raise ConfigError(f"{path}: expected {kind.__name__}, got {value!r} of type {type(value).__name__}{hint}")
    return value


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def below(config: Config, minimum: float, *keys: str):
    """For `problems`: those of `keys` whose value is less than `minimum`."""
    return (
        (key, f"must be at least {minimum}, is {getattr(config, key)}")
        for key in keys
        if getattr(config, key) < minimum
    )


def outside(config: Config, low: float, high: float, *keys: str):
    """For `problems`: those of `keys` whose value does not lie in [low, high]."""
    return (
        (key, f"must lie in [{low}, {high}], is {getattr(config, key)}")
        for key in keys
        if not low <= getattr(config, key) <= high
    )


@dataclass(frozen=True)
class RewardConfig(Config):
    progress: float  # per pixel of new best x since the reset
    flag: float  # for reaching the flag
    clock: float  # cost of each tick of the game's clock
    death: float  # cost of dying


@dataclass(frozen=True)
class EnvConfig(Config):
    level: str  # "world-stage", e.g. "1-1"
    action_repeat: int  # emulator frames a decision
    noop_max: int  # a start has 0 to this many no-op frames, drawn from the episode's seed
    time_limit: int  # decisions after which an episode is truncated
    stall_limit: int  # decisions without a new best x after which it is truncated; 0: never
    reward: RewardConfig

    def for_evaluation(self) -> Self:
        """The game as it is evaluated, shown and played: a stall ends no episode."""
        return dataclasses.replace(self, stall_limit=0)

    def problems(self):
        world, _, stage = self.level.partition("-")
        if world not in tuple("12345678") or stage not in tuple("1234"):
            yield "level", f'must be "1-1" to "8-4", is {self.level!r}'
        yield from below(self, 1, "action_repeat", "time_limit")
        yield from below(self, 0, "noop_max", "stall_limit")


@dataclass(frozen=True)
class ModelConfig(Config):
    """Sizes of the networks (sections 2.1 to 2.7 of the specification)."""

    deter: int  # D: units of the recurrent state
    stoch: int  # S: categoricals of the stochastic state
    classes: int  # K: classes of each
    hidden: int  # units of the layers inside the RSSM
    depth: int  # channels of the encoder's first layer; doubled in each of the next three
    units: int  # units of each hidden layer of the heads, actor and critic
    layers: int  # their number
    buckets: Literal["symlog", "symexp"]  # how rewards and values are averaged (`dreamer.distributions.TwoHot`)
    initial: Literal["learned", "zero"]  # the RSSM's state at the start of an episode
    unimix_ratio: float  # share of the uniform distribution in latents
    posterior_scale: float  # of the posterior's first logits

    def problems(self):
        if self.posterior_scale <= 0:
            yield "posterior_scale", f"must be positive, is {self.posterior_scale}"
        yield from below(self, 1, "deter", "stoch", "hidden", "depth", "units", "layers")
        yield from below(self, 2, "classes")
        yield from outside(self, 0, 1, "unimix_ratio")


@dataclass(frozen=True)
class LossConfig(Config):
    """Weights of the world model's losses (section 3.1)."""

    free_nats: float
    dyn_scale: float
    rep_scale: float
    image_focus: float  # pixels weigh as their error to this power; 0: all the same
    reward_scale: float
    continue_scale: float

    def problems(self):
        return below(self, 0, *self.names())


@dataclass(frozen=True)
class BehaviorConfig(Config):
    """Imagination, actor and critic (section 3.2)."""

    model_average: float  # imagination and play take the world model's moving average: share kept at each update
    imag_horizon: int
    imag_starts: int  # the first so many time steps of each sequence are starts; 0: all
    imag_gradient: Literal["reinforce", "dynamics", "both"]
    imag_gradient_mix: float  # share of dynamics in "both"
    discount: float
    discount_lambda: float
    entropy: float  # weight of the policy's entropy when training begins
    entropy_final: float | None  # and when it ends; None: the same
    entropy_decay: float  # share of training, the last, over which it falls evenly
    unimix_ratio: float  # share of the uniform distribution in the policy
    normalize: Literal["returns", "advantages"]  # whose spread is the actor's unit
    return_decay: float  # of the percentile normalization's moving average
    slow_target: bool  # regularize the critic towards its slow copy
    slow_target_update: int  # updates between two steps of the copy
    slow_target_fraction: float  # how far it moves each time

    def problems(self):
        yield from below(self, 1, "imag_horizon", "slow_target_update")
        yield from below(self, 0, "imag_starts", "entropy")
        if self.entropy_final is not None:
            yield from below(self, 0, "entropy_final")
        yield from outside(
            self,
            0,
            1,
            "model_average",
            "imag_gradient_mix",
            "discount",
            "discount_lambda",
            "entropy_decay",
            "unimix_ratio",
            "return_decay",
            "slow_target_fraction",
        )


@dataclass(frozen=True)
class OptimizerConfig(Config):
    lr: float
    eps: float
    grad_clip: float  # global norm

    def problems(self):
        return below(self, 0, *self.names())


def left_of(decay: float, done: float) -> float:
    """What is left, 1 to 0, of what falls evenly over the last share `decay` of training, `done` of which is over."""
    return min(1.0, (1 - done) / decay) if decay else 1.0


@dataclass(frozen=True)
class OptimizersConfig(Config):
    model: OptimizerConfig
    actor: OptimizerConfig
    critic: OptimizerConfig
    lr_decay: float  # share of training, the last, over which all learning rates fall evenly to a tenth; 0: they stay

    def problems(self):
        return outside(self, 0, 1, "lr_decay")

    def lr_scale(self, done: float) -> float:
        """Of the learning rates, when `done` of the training, 0 to 1, is over."""
        return 0.1 + 0.9 * left_of(self.lr_decay, done)


@dataclass(frozen=True)
class ComputeConfig(Config):
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]
    compile: bool


@dataclass(frozen=True)
class AgentConfig(Config):
    """All that defines an agent; stored in its checkpoints."""

    model: ModelConfig
    losses: LossConfig
    behavior: BehaviorConfig
    optimizers: OptimizersConfig


@dataclass(frozen=True)
class ReplayConfig(Config):
    capacity: int  # transitions kept
    chunk_length: int  # transitions of one environment in one file
    context: bool  # sequences start from stored states of the model, refreshed at every update; else afresh
    recent_share: float  # of each batch's sequences, how many start among the latest steps
    recent_steps: int  # how many steps count as the latest

    def problems(self):
        yield from below(self, 1, "capacity", "chunk_length", "recent_steps")
        yield from outside(self, 0, 1, "recent_share")


@dataclass(frozen=True)
class ArchiveConfig(Config):
    """Episodes that begin where earlier ones have been (`dreamer.archive`), while collecting and training alone."""

    share: float  # of the episodes; 0: all begin at the level's start
    practice: float  # of those, how many are about a place where one from the start has lately failed, and end after it
    cell: int  # pixels of a place
    kept: int  # ways to get there, the newest, of each place

    def problems(self):
        yield from outside(self, 0, 1, "share", "practice")
        yield from below(self, 1, "cell", "kept")


@dataclass(frozen=True)
class TrainingConfig(Config):
    """The loop of collecting and updating. Steps are emulator frames."""

    steps: int  # frames in all, the seed data's included
    envs: int  # emulators that collect side by side
    batch_size: int
    batch_length: int
    train_ratio: float  # replayed time steps per decision
    pretrain: int  # updates on the seed data before the first decision, which the train ratio does not count

    def problems(self):
        yield from below(self, 1, "steps", "envs", "batch_size")
        yield from below(self, 2, "batch_length")
        yield from below(self, 0, "train_ratio", "pretrain")
