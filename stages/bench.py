"""`make bench`: what an update, its parts, acting, the emulator and sampling cost on this machine.

Prints one table and writes reports/bench.json. Times are medians after a warm-up; every size runs in a process of its
own, so that its peak memory is its own.
"""

import argparse
import functools
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from dreamer.agent import Agent
from dreamer.config import AgentConfig, ComputeConfig, ReplayConfig
from dreamer.mario import ACTIONS, make_env
from dreamer.networks import centered
from dreamer.replay import Batch, Replay
from dreamer.rollout import RandomPolicy, Rollout, Steps, episode_seeds
from stages import git, provenance
from stages.allocator import keep_freed_memory
from stages.params import load
from stages.paths import REPORTS

# deter, hidden, units, stoch, classes, depth; batch, length
SIZES = {
    "small": ((256, 256, 256, 16, 16, 16), (8, 32)),
    "prototype": ((512, 256, 256, 32, 16, 16), (8, 32)),
    "document": ((512, 512, 512, 32, 32, 32), (16, 64)),
}


def median_ms(work: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 2) -> float:
    """Milliseconds; waits for the device before it reads the clock."""
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[warmup:])


def random_batch(batch: int, length: int) -> Batch:
    rng = np.random.default_rng(0)
    none = np.zeros((batch, length), bool)
    obs = rng.integers(0, 256, (batch, length, 64, 64, 3), dtype=np.uint8)
    return Batch(
        obs, rng.integers(0, 7, (batch, length)), rng.normal(size=(batch, length)).astype("f4"), none, none, none
    )


def measure_size(size: str, config: AgentConfig, compute: ComputeConfig, repeats: int) -> dict[str, float]:
    """An update and its parts, acting for 1 and 8 environments (ms), peak memory (GB).

    The parts are measured one after another on the whole batch; on a CPU an update does them in several processes, each
    with its share of the batch.
    """
    keep_freed_memory()
    (deter, hidden, units, stoch, classes, depth), (length, steps) = SIZES[size]
    model = replace(
        config.model, deter=deter, hidden=hidden, units=units, stoch=stoch, classes=classes, depth=depth, layers=3
    )
    agent = Agent(replace(config, model=model), compute, len(ACTIONS))
    batch, device = random_batch(length, steps), agent.device
    with agent.team(length, keep_freed_memory) as team:
        found = {"update": median_ms(lambda: agent.update(batch), device, repeats)}
        if device.type == "cuda":
            found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        else:  # what the processes share is counted once
            peaks, shared = zip(*team.everywhere(_memory), strict=True)
            found["memory_gb"] = sum(peaks) - sum(shared[1:])
    world, behavior = agent.world_model, agent.actor_critic
    obs, reward, first, last, action = (
        torch.as_tensor(x, device=device)
        for x in (batch.obs, batch.reward, batch.is_first, batch.is_terminal, batch.action)
    )
    pixels, action = centered(obs), agent.one_hot(action)

    def timed(work: Callable[[], Any]) -> float:
        with agent.autocast():
            return median_ms(work, device, max(3, repeats // 2), 1)

    def backward(losses: Callable[[], Sequence[Tensor]], networks: Sequence[nn.Module]) -> float:
        def work() -> None:
            for loss, network in zip(losses(), networks, strict=True):
                torch.autograd.grad(loss, list(network.parameters()))

        return timed(work)

    found["encoder"] = timed(lambda: world.encoder(pixels))
    with agent.autocast():
        embed = world.encoder(pixels).detach()
    found["observe"] = timed(lambda: world.rssm.observe(embed, action, first))
    model_loss = lambda: world.loss(obs, action, reward, first, last)  # noqa: E731
    forward = timed(model_loss)
    found["decoder and heads"] = forward - found["encoder"] - found["observe"]
    found["model backward"] = backward(lambda: model_loss()[:1], [world]) - forward
    zero_step = lambda name: agent.optimizers[name].step(  # noqa: E731
        [torch.zeros_like(parameter) for parameter in agent.optimizers[name].parameters]
    )
    found["model optimizer"] = timed(lambda: zero_step("model"))
    with agent.autocast():
        start, rssm = model_loss()[2].map(lambda part: part.flatten(0, 1)), world.constant_rssm()
    shape = (config.behavior.imag_horizon, len(start.index))
    noise = torch.rand(*shape, device=device), torch.rand(*shape, stoch, device=device)
    unit = torch.zeros((), device=device), torch.ones((), device=device)
    found["imagine"] = timed(lambda: behavior.imagine(rssm, start, *noise, True))
    dream_losses = lambda: behavior.losses(behavior.dream(world, rssm, start, *noise), unit)  # noqa: E731
    losses = timed(dream_losses)
    found["heads and returns"] = losses - found["imagine"]
    found["actor and critic backward"] = (
        backward(lambda: dream_losses()[:2], [behavior.actor, behavior.critic]) - losses
    )
    found["their optimizers"] = timed(lambda: (zero_step("actor"), zero_step("critic")))
    for n in (1, 8):
        policy = agent.policy()
        seen, fresh = np.zeros((n, 64, 64, 3), np.uint8), np.zeros(n, bool)
        found[f"act for {n}"] = median_ms(lambda seen=seen, fresh=fresh, policy=policy: policy(seen, fresh), device, 20)
    return found


def measure_game(env_config: Any) -> dict[str, float]:
    """Decisions a second: the bare emulator, the environment, and rollouts of several, each in a thread.

    They take turns, 24 decisions each, so that whatever else the machine does slows them alike.
    """
    config = replace(env_config, stall_limit=0, time_limit=10**6)
    bare, played, repeat, turn = make_env(config), make_env(config), config.action_repeat, 24

    def emulate() -> int:
        for _ in range(turn * repeat):
            bare._game._env.frame_advance(0)
        return turn

    def play() -> int:
        for _ in range(turn):
            played.step(0)
        return turn

    def roll(rollout: Rollout) -> int:
        taken = 0
        while taken < turn:
            taken += rollout.step()[2]
        return taken

    rollouts = {
        n: Rollout([make_env(config) for _ in range(n)], RandomPolicy([1] * 7, 0), episode_seeds(0, "bench"))
        for n in (1, 2, 8)
    }
    works = {"bare": emulate, "environment": play}
    works |= {f"rollout of {n}": functools.partial(roll, rollout) for n, rollout in rollouts.items()}
    rates: dict[str, list[float]] = {name: [] for name in works}
    for env in (bare, played):
        env.reset(options={"noops": 0})
    for _ in range(2 + 20):
        for name, work in works.items():
            start = time.perf_counter()
            rates[name].append(work() / (time.perf_counter() - start))
    for rollout in rollouts.values():
        rollout.stop()
    found = {name: statistics.median(each[2:]) for name, each in rates.items()}
    shares = [100 * env / alone for alone, env in zip(rates["bare"][2:], rates["environment"][2:], strict=True)]
    return found | {"environment, % of bare": statistics.median(shares)}


def measure_sampling() -> dict[str, float]:
    """Milliseconds for a batch with its contexts out of 20,000 steps, and to write its states back."""
    replay, (stoch, deter) = (
        Replay(ReplayConfig(10**6, 1024, context=True, recent_share=0.0, recent_steps=2000)),
        (32, 512),
    )
    steps, latents = Steps.empty(1, (64, 64, 3)), (np.zeros((1, stoch), np.uint8), np.zeros((1, deter), np.float32))
    for _ in range(20_000):
        replay.add(["bench"], steps, latents)
    rng, cpu, found = np.random.default_rng(0), torch.device("cpu"), {}
    for b, t in ((8, 32), (16, 64)):
        found[f"{b} x {t}"] = median_ms(lambda b=b, t=t: replay.sample(b, t, rng), cpu, 20)
        origins = replay.sample(b, t, rng).origins
        states = np.zeros((b, t, stoch), np.uint8), np.zeros((b, t, deter), np.int8)
        write = lambda origins=origins, states=states: replay.refresh(origins, *states)  # noqa: E731
        found[f"{b} x {t} back"] = median_ms(write, cpu, 20)
    return found


def _memory() -> tuple[float, float]:
    """Of this process in GB: the peak of what it had, and how much of what it has it shares with others."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return peak, getattr(psutil.Process().memory_info(), "shared", 0) / 1e9


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated; default: %(default)s")
    parser.add_argument("--precisions", default="float32,bfloat16", help="default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="leave out what compute.compile: true brings")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()
    params = load()
    results: dict[str, Any] = {
        "machine": provenance.hardware(),
        "versions": provenance.versions(),
        "commit": git.state()[0],
        "threads": torch.get_num_threads(),
        "update": {},
    }
    for size in options.sizes.split(","):
        for precision in options.precisions.split(","):
            for compiled in (False,) if options.eager else (False, True):
                if compiled and precision == "float32" and not torch.cuda.is_available():
                    continue  # the CPU's kernels are for bfloat16
                compute = ComputeConfig(params.compute.device, precision, compiled)
                name = f"{size} {precision}{' compiled' if compiled else ''}"
                found = _alone(measure_size, size, params.agent, compute, options.repeats)
                results["update"][name] = found
                print(f"{name}: update {found['update']:.0f} ms, peak {found['memory_gb']:.2f} GB", flush=True)
    results["decisions a second"] = _alone(measure_game, params.env)
    results["sampling, ms"] = _alone(measure_sampling)
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """All of it for people: rows are parts, columns sizes."""
    columns = list(results["update"])
    width = max(map(len, columns)) + 2
    lines = [f"{'ms (median)':<26}" + "".join(f"{name:>{width}}" for name in columns)]
    for part in results["update"][columns[0]]:
        digits = 2 if part == "memory_gb" else 1
        lines.append(f"{part:<26}" + "".join(f"{results['update'][name][part]:>{width}.{digits}f}" for name in columns))
    for group in ("decisions a second", "sampling, ms"):
        lines.append(f"{group}: " + ", ".join(f"{name} {value:.1f}" for name, value in results[group].items()))
    machine = results["machine"]
    lines.append(f"{machine['cpu']}, {results['threads']} threads, {machine['gpu'] or 'no GPU'}")
    return "\n".join(lines)
