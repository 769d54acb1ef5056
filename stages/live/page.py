"""A connected page, as the server sees it."""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect


@dataclass
class Shown:
    """What there is to show after a step or a command."""

    view: bytes
    film: bytes | None  # if it was dreamt just now
    episodes: list[dict[str, Any]]  # that ended since the last time


class Page:
    """A connected page. A view, or a film, that is not sent yet gives way to the next one; notes are all sent."""

    def __init__(self, socket: WebSocket):
        self.socket = socket
        self.sent = self.seen = 0  # views
        self._view: bytes | None = None
        self._film: bytes | None = None
        self._notes: list[str] = []
        self._something = asyncio.Event()

    def note(self, **what: Any) -> None:
        self._notes.append(json.dumps(what))
        self._something.set()

    def show(self, shown: Shown) -> None:
        for row in shown.episodes:
            self.note(episode=row)
        self._view, self._film = shown.view, shown.film or self._film
        self._something.set()

    @property
    def behind(self) -> int:
        """Views that it has not drawn yet."""
        return self.sent - self.seen + (self._view is not None)

    async def send(self) -> None:
        """Until the connection ends."""
        with suppress(RuntimeError, WebSocketDisconnect):
            while True:
                await self._something.wait()
                self._something.clear()
                notes, self._notes = self._notes, []
                for text in notes:
                    await self.socket.send_text(text)
                if self._film is not None:
                    film, self._film = self._film, None
                    await self.socket.send_bytes(film)
                if self._view is not None:
                    view, self._view = self._view, None
                    self.sent += 1
                    await self.socket.send_bytes(view)
