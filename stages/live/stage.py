"""The session on stage: its pace, the page that watches it, and what that page asks for.

One thread does all that the session does, so commands and steps never meet. The game is never more than one view ahead
of what the page has drawn: a slow page slows it down, and a page that is gone stops it. One page is on stage: the
latest that comes has it, and the one before is told.
"""

import asyncio
import json
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from dreamer.mario import ACTIONS
from stages.__main__ import told
from stages.live.errors import LiveError
from stages.live.hands import BUTTONS
from stages.live.messages import pack
from stages.live.page import Page, Shown
from stages.live.session import AHEAD, Session
from stages.live.views import film_view, view

SPEEDS = (2, 5, 15, 30, 0)  # decisions a second; the game's own is 15; 0: as many as can be
MOVED = 4001  # code of a websocket that is closed because another page has the stage
ON_TIME = 0.01  # seconds after its time at which a step still is
LATE = 0.25  # seconds that are caught up with, not more


class Stage:
    """
    Args:
        models: names of models to pick from, each with what it is
    """

    def __init__(self, session: Session, models: Callable[[], Awaitable[list[dict[str, str]]]]):
        self.session, self.models = session, models
        self._listing: asyncio.Task[None] | None = None
        self.running, self.speed = True, 15
        self.page: Page | None = None
        self._turn = asyncio.Event()
        self._door = asyncio.Lock()  # one page at a time comes in
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="session")
        self._listed = 0  # episodes that the page knows

    async def play(self) -> None:
        """Steps the session while there is a page that keeps up.

        Dreaming ahead can take longer than a step may. So it waits until the steps have caught up: the pace is kept,
        and the film is as fresh as the machine can make it.
        """
        due = time.monotonic()
        while True:
            await self._turn.wait()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not self._turn.is_set():  # paused meanwhile
                continue
            now = time.monotonic()
            on_time = self.speed and now < due + ON_TIME
            due = max(due, now - LATE) + (1 / self.speed if self.speed else 0.0)
            try:
                shown = await self._in_thread(self._next, on_time)
                if self.page:
                    self.page.show(shown)
            except Exception as error:
                self.running = False
                self._tell(error)
            self._check()

    def _next(self, dream_ahead: bool) -> Shown:
        """A step. What comes next is dreamt if there is time, and when the last film is used up."""
        self.session.step()
        age = self.session.film_age
        if dream_ahead or age is None or age >= AHEAD:
            self.session.look_ahead()
        return self._shown()

    def _still(self) -> Shown:
        """What a session shows that stands still: always with what comes next."""
        if self.session.film_age != 0:
            self.session.look_ahead()
        return self._shown()

    def _shown(self) -> Shown:
        numbers, pictures = view(self.session)
        fresh, self._listed = self.session.ended - self._listed, self.session.ended
        return Shown(
            pack({**numbers, "running": self.running, "speed": self.speed}, pictures),
            pack(*film_view(self.session)) if self.session.film_age == 0 else None,
            list(self.session.episodes)[-fresh:] if fresh else [],
        )

    async def welcome(self, socket: WebSocket) -> None:
        """Serves a page until it is gone."""
        await socket.accept()
        page = Page(socket)
        sending = asyncio.create_task(page.send())
        try:
            async with self._door:
                former, self.page = self.page, None
                self._check()
                if former:
                    with suppress(RuntimeError, WebSocketDisconnect):
                        await former.socket.close(MOVED, "another page has it")
                page.note(hello=await self._in_thread(self._hello))
                page.show(await self._in_thread(self._still))
                self.page = page
            self._check()
            while True:
                await self._heed(page, await socket.receive_text())
        except (WebSocketDisconnect, RuntimeError):  # the latter: closed from here, for another page
            pass
        finally:
            sending.cancel()
            if self.page is page:
                self.page, self.running = None, False
                self.session.hands.hold(())
            self._check()

    def _hello(self) -> dict[str, Any]:
        self._listed = self.session.ended
        return {
            "actions": list(ACTIONS),
            "buttons": BUTTONS,
            "speeds": SPEEDS,
            "ahead": AHEAD,
            "history": list(self.session.history),
            "episodes": list(self.session.episodes),
            "device": self.session.agent.device.type,
        }

    async def _heed(self, page: Page, text: str) -> None:
        try:
            command = json.loads(text) if text.startswith("{") else None
            await self._obey(page, command)
            if command["do"] not in ("seen", "hold", "models"):
                page.show(await self._in_thread(self._shown if self.running else self._still))
        except json.JSONDecodeError:
            page.note(error=f"{text[:80]}: not a command")
        except Exception as error:
            self._tell(error)
        self._check()

    async def _obey(self, page: Page, command: Any) -> None:
        """
        Raises:
            LiveError and the session's errors: it cannot be done; nothing has changed
        """
        session, do = self.session, self._in_thread
        match command:
            case {"do": "seen", "value": int(views)}:
                page.seen = min(page.sent, max(page.seen, views))
            case {"do": "run", "value": bool(on)}:
                self.running = on
            case {"do": "step"}:
                self.running = False
                if page.behind < 2:  # a held key repeats faster than a slow page draws
                    await do(session.step)
            case {"do": "speed", "value": speed} if speed in SPEEDS:
                self.speed = speed
            case {"do": "greedy", "value": bool(on)}:
                await do(session.set_greedy, on)
            case {"do": "take", "value": bool(on)}:
                await do(session.hands.take, on)
            case {"do": "hold", "value": list(buttons)}:
                session.hands.hold(map(str, buttons))
            case {"do": "dream", "value": bool(on)}:
                await do(session.enter_dream if on else session.leave_dream)
            case {"do": "begin", "seed": int(seed), "level": str(level)}:
                await do(session.begin, seed, level)
            case {"do": "next"}:
                await do(session.begin, (session.episode.seed + 1) % 2**32)
            case {"do": "pick", "value": str(model)}:
                await do(session.pick, model)
            case {"do": "models"}:
                if self._listing is None or self._listing.done():
                    self._listing = asyncio.create_task(self._list_models())
            case _:
                raise LiveError(f"{json.dumps(command)[:80]}: not a command of this page; reload it")

    async def _list_models(self) -> None:
        found = await self.models()
        if self.page:
            self.page.note(models=found)

    def _tell(self, error: Exception) -> None:
        """Errors are the page's to show; ours go to the terminal, too."""
        line = told(error)
        if line is None:
            traceback.print_exception(error)
            line = f"{type(error).__name__} in the program; the terminal that runs it says more"
        if self.page:
            self.page.note(error=line)

    def _check(self) -> None:
        """Whether it is the game's turn."""
        ready = self.running and self.page is not None and self.page.behind < 2
        self._turn.set() if ready else self._turn.clear()

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def stop(self) -> None:
        """Ends what still runs in the background."""
        if self._listing is not None:
            self._listing.cancel()
            await asyncio.wait([self._listing])

    def close(self) -> None:
        self._thread.shutdown()
        self.session.close()
