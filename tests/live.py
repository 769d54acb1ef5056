"""Live sessions of small, untrained agents, and a real server for them in this process."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from agents import CPU, small_agent
from websockets.sync.client import connect

from dreamer import checkpoint
from dreamer.checkpoint import load_agent
from dreamer.config import EnvConfig
from dreamer.mario import make_env
from stages import params
from stages.live import server
from stages.live.messages import unpack
from stages.live.session import Session
from stages.live.stage import Stage

ROOT = Path(__file__).parents[1]


def config(level: str = "1-1", time_limit: int = 20) -> EnvConfig:
    env = params.load(ROOT / "params.yaml").env.to_dict()
    return EnvConfig.from_dict({**env, "level": level, "time_limit": time_limit}).for_evaluation()


def save_agents(folder: Path) -> Path:
    """Two agents, one.pt and two.pt."""
    for seed, name in enumerate(("one.pt", "two.pt")):
        torch.manual_seed(seed)
        checkpoint.save(folder / name, checkpoint.agent_state(small_agent()))
    return folder


@contextmanager
def open_session(folder: Path, time_limit: int = 20, seed: int = 3, greedy: bool = False) -> Iterator[Session]:
    """Of the agents that `save_agents` left in `folder`; one.pt plays."""
    session = Session(
        lambda name: load_agent(folder / name, CPU),
        lambda level: make_env(config(level, time_limit)),
        *("one.pt", "1-1", seed, greedy),
    )
    yield session
    session.close()


class Served:
    """A stage that is served by a thread of this process."""

    def __init__(self, session: Session):
        async def known():
            return [{"name": name, "about": "checkpoint"} for name in ("one.pt", "two.pt", "three.pt")]

        self.stage = Stage(session, known)
        self.socket = server.bind(0)
        self.host = "{}:{}".format(*self.socket.getsockname())
        self.url = f"http://{self.host}/"
        self.uvicorn = uvicorn.Server(server.configuration(self.stage))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def client(self, origin: str | None = None, **options):
        return connect(f"ws://{self.host}/session", origin=origin or self.url.rstrip("/"), **options)

    def drop(self) -> None:
        """Cuts the page's connection off."""
        closing = self.stage.page.socket.close(1011)
        asyncio.run_coroutine_threadsafe(closing, self.uvicorn.servers[0].get_loop()).result(30)

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()


def views(client, wanted: int, timeout: float = 30.0) -> list[dict]:
    """The numbers of so many views."""
    found = []
    while len(found) < wanted:
        message = client.recv(timeout=timeout)
        if isinstance(message, bytes) and "film" not in (numbers := unpack(message)[0]):
            found.append(numbers)
    return found


def say(client, **command) -> None:
    client.send(json.dumps(command))


def until(client, key: str):
    """The next note with this key."""
    while True:
        message = client.recv(timeout=60)
        if isinstance(message, str) and key in (note := json.loads(message)):
            return note[key]
