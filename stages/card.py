"""The model card: what a model is, what it can do, what it was made of, in Markdown."""

from typing import Any


def write(lineage: dict[str, Any], frames: int | None) -> str:
    """From what `stages.lineage.collect` gives."""
    trained, params, evaluation = lineage["trained"], lineage["params"], lineage["evaluation"]
    env = params["env"]
    code = trained["commit"] or "unknown"
    changed = ", with uncommitted changes" if trained["dirty"] else ""
    data, machine, versions = lineage["data"], lineage["hardware"], lineage["environment"]["versions"]
    return f"""# DreamerV3 plays Super Mario Bros, level {env["level"]}

A world model with actor and critic, trained from pixels.
Profile `{trained["profile"]}`, seed {trained["seed"]}{_after(frames)}{_effort(lineage)}.{_note(lineage)}

## Input and output
64 x 64 RGB images (uint8) to one of seven joypad actions, a decision every {env["action_repeat"]} frames.
It remembers what it saw, so frames come in order, and a new episode is announced.

## Results
{evaluation["sampled"]["episodes"]} episodes each, with seeds that neither training nor the choice of the checkpoint
used; 95% intervals. A start is 0 to {env["noop_max"]} frames without a button, so training has met each of these.

{results(evaluation)}
{_failures(evaluation["sampled"])}
## Made of
- code `{code}`{changed}
- seed data `{data["seed_data_sha256"]}` (SHA-256), replay `{data["replay_md5"]}` (DVC)
- ROM `{data["rom_sha256"]}` (SHA-256), which ships with gym-super-mario-bros
- {machine["cpu"]}, {machine["cores"]} cores, {machine["gpu"] or "no GPU"}; torch {versions.get("torch")}

## Limits
It knows level {env["level"]} and what it met there. On other levels it mostly fails.
Sampled play differs from episode to episode; greedy play repeats itself from the same start.
"""


def _row(mode: str, result: dict[str, Any]) -> str:
    return (
        f"| {mode} | {result['clear_rate']:.1%} [{result['clear_rate_low']:.1%}, {result['clear_rate_high']:.1%}] "
        f"| {'none' if (decisions := result['decisions_to_flag']) is None else f'{decisions:.0f}'} "
        f"| {result['return_mean']:.0f} [{result['return_low']:.0f}, {result['return_high']:.0f}] "
        f"| {result['best_x_max']} |"
    )


def results(evaluation: dict[str, Any]) -> str:
    """A table, a row for each way to play."""
    rows = [_row(mode, evaluation[mode]) for mode in ("sampled", "greedy")]
    return "\n".join(
        [
            "| play | clear rate | decisions to the flag, median | mean return | best x |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _effort(lineage: dict[str, Any]) -> str:
    """Of the whole training, of which the model is one checkpoint."""
    if not (whole := lineage.get("training")):
        return ""
    return (
        f" of a training of {whole['decisions']:,} decisions, {whole['updates']:,} updates and {whole['hours']:.1f} h"
    )


def _note(lineage: dict[str, Any]) -> str:
    return f"\n{note}" if (note := lineage.get("note")) else ""


def _failures(result: dict[str, Any]) -> str:
    if (failures := result.get("failures")) is None:
        return ""
    told = [f"- start {each['seed']}: {each['outcome']} at x {each['best_x']}" for each in failures] or ["- none"]
    return "\n".join(["", "Sampled episodes that did not reach the flag:", *told, ""])


def _after(frames: int | None) -> str:
    return f", after {frames:,} frames" if frames else ""
