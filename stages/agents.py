"""Trained agents from whatever holds one."""

from pathlib import Path

from dreamer import checkpoint
from dreamer.agent import Agent
from dreamer.config import ComputeConfig
from stages import bundle


def load_agent(path: Path, compute: ComputeConfig) -> Agent:
    """The agent of a bundle (stages/bundle.py) or of a checkpoint file.

    Raises:
        BundleError: the bundle is damaged, or its weights are no numbers
        CheckpointError: the file is damaged, or of another architecture
    """
    state = bundle.load(path) if path.is_dir() else checkpoint.load(path)
    return checkpoint.build_agent(state, compute, None, path)
