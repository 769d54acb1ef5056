"""Several processes that share an update: it is the same update, and none outlives the one that started it."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children

import psutil
import pytest
import torch
from agents import agent_config, random_batch, small_agent

from dreamer import checkpoint
from dreamer.agent import Agent
from dreamer.config import ComputeConfig
from dreamer.team import WorkerError


@pytest.fixture(autouse=True)
def three_threads(threads):
    torch.set_num_threads(3)


@pytest.mark.parametrize("estimator", ["reinforce", "dynamics"])
def test_an_update_by_a_team_is_the_same_update(estimator):
    """Of 5 rows by 1, 2 and 3 processes: shares that are not equal. An eps above rounding, as Adam's first steps have a
    gradient's sign only, and that of one that is nothing but rounding is anyone's."""
    smooth = {"lr": 1e-3, "eps": 1e-3, "grad_clip": 100.0}
    optimizers = {"model": smooth, "actor": smooth, "critic": smooth}
    found = []
    for size in (1, 2, 3):
        torch.manual_seed(0)
        torch.set_num_threads(3)
        agent = small_agent(behavior={"imag_gradient": estimator, "model_average": 0.9}, optimizers=optimizers)
        with agent.team(size):
            assert len(active_children()) == size - 1 and torch.get_num_threads() == 3 // size
            for seed in range(2):
                torch.manual_seed(seed)
                agent.anneal(seed / 2)
                metrics, states = agent.update(random_batch(batch=5, seed=seed))
        weights = {name: value for name, value in agent.named_parameters() if "initial" not in name}
        found.append((metrics, states, weights))
    for metrics, states, weights in found[1:]:
        assert torch.equal(states.index, found[0][1].index) and states.deter.dtype == found[0][1].deter.dtype
        torch.testing.assert_close(states.deter, found[0][1].deter, rtol=1e-3, atol=1e-5)
        assert metrics.keys() == found[0][0].keys()
        for name, value in metrics.items():
            torch.testing.assert_close(value, found[0][0][name], rtol=1e-3, atol=1e-5, msg=name)
        for name, value in weights.items():
            torch.testing.assert_close(value, found[0][2][name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_time_changes_reaches_the_workers():
    """Actor's and critic's gradients with an entropy's weight that has fallen are those of one process."""
    found = []
    for size in (1, 2):
        torch.manual_seed(0)
        agent = small_agent(behavior={"entropy": 10.0, "entropy_final": 0.0})
        with agent.team(size):
            agent.anneal(1.0)
            found.append(agent.update(random_batch(batch=4))[0]["actor_loss"])
    torch.testing.assert_close(*found)
    agent = small_agent(behavior={"entropy": 10.0})
    assert abs(agent.update(random_batch(batch=4))[0]["actor_loss"] - found[0]) > 1


def test_kernels_in_bfloat16_and_fewer_rows_than_processes():
    losses = []
    for size in (1, 3):
        torch.manual_seed(0)
        agent = Agent(agent_config(model={"classes": 16}), ComputeConfig("cpu", "bfloat16", True), 7)
        with agent.team(size):
            for rows in (4, 2, 1):
                torch.manual_seed(rows)
                metrics, states = agent.update(random_batch(batch=rows))
                assert len(states.index) == rows and states.deter.dtype == torch.bfloat16
                losses.append(float(metrics["image_loss"]))
    assert losses[:3] == pytest.approx(losses[3:], rel=0.01)


def test_checkpoints_of_a_team_are_those_of_one_process(tmp_path):
    """As large, and of the same values; what is loaded within a team is what the workers go on from."""
    agent, other = small_agent(behavior={"model_average": 0.9}), small_agent(behavior={"model_average": 0.9})
    agent.update(random_batch())
    checkpoint.save(tmp_path / "alone.pt", {"state": agent.training_state()})
    with agent.team(2):
        checkpoint.save(tmp_path / "team.pt", {"state": agent.training_state()})
    sizes = [(tmp_path / name).stat().st_size for name in ("alone.pt", "team.pt")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    torch.manual_seed(5)
    expected, _ = agent.update(random_batch(seed=5))
    with other.team(2):
        other.load_training_state(checkpoint.load(tmp_path / "team.pt")["state"])
        torch.manual_seed(5)
        found, _ = other.update(random_batch(seed=5))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_worker_that_ends_is_told_in_one_line():
    agent = small_agent()
    with agent.team(2):
        agent.update(random_batch())
        active_children()[0].kill()
        with pytest.raises(
            WorkerError, match=r"was ended by SIGKILL; where memory is short, .*OMP_NUM_THREADS=1"
        ) as told:
            agent.update(random_batch())
        assert "\n" not in str(told.value)
    agent.update(random_batch())  # alone again


def test_an_error_in_a_worker_is_an_error_here():
    agent = small_agent()
    with agent.team(2) as team:
        with pytest.raises(RuntimeError, match=r"in a worker process:(.|\n)*ZeroDivisionError"):
            team.everywhere(_fails_elsewhere)
        assert team.everywhere(os.getpid)[1] == active_children()[0].pid
    assert not active_children()


def _fails_elsewhere() -> None:
    if torch.multiprocessing.parent_process():
        1 / 0  # noqa: B018


def test_no_worker_outlives_a_killed_training(tmp_path):
    code = """
import torch
from agents import random_batch, small_agent
if __name__ == "__main__":
    torch.set_num_threads(2)
    agent = small_agent()
    with agent.team(2):
        agent.update(random_batch())
        print("ready", flush=True)
        while True:
            agent.update(random_batch())
"""
    script = tmp_path / "training.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout.readline() == "ready\n"
        family = psutil.Process(training.pid).children(recursive=True)
        assert family
        for worker in family:
            worker.send_signal(signal.SIGINT)  # a terminal's Ctrl-C goes to all; what comes of it is the first's to say
            worker.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert training.poll() is None
        training.kill()
    assert not psutil.wait_procs(family, timeout=30)[1]


def test_too_little_shared_memory_is_told_in_one_line(tmp_path):
    """Where another /dev/shm can be mounted: by root."""
    code = """
import torch
from agents import small_agent
from dreamer.team import WorkerError
if __name__ == "__main__":
    torch.set_num_threads(2)
    try:
        with small_agent().team(2):
            print("there was room")
    except WorkerError as error:
        print(error)
"""
    script = tmp_path / "training.py"
    script.write_text(code)
    mount = "mount -t tmpfs -o size=1m none /dev/shm"
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs root")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (
        done.stdout.startswith("/dev/shm: 1 MB are free, a team of processes needs ") and done.stdout.count("\n") == 1
    )
