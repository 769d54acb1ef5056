"""The page and its websocket, for this machine's own browsers alone.

Other sites must not drive it: a name that is not loopback's is refused (DNS rebinding), and so is a websocket whose
origin is not the page itself.
"""

import asyncio
import errno
import socket
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import FileResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from stages.live.errors import LiveError
from stages.live.session import Session
from stages.live.stage import Stage

HOST, PORT = "127.0.0.1", 8765
FILES = ("page.html", "page.css", "page.js", "connection.js", "controls.js", "picture.js", "charts.js")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def application(stage: Stage) -> FastAPI:
    """`/` and its files, and the websocket at `/session`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        playing = asyncio.create_task(stage.play())
        yield
        playing.cancel()
        with suppress(asyncio.CancelledError):
            await playing
        await stage.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)

    @app.middleware("http")
    async def add_headers(request: Request, call_next) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    for name in FILES:
        path = Path(__file__).with_name(name)
        app.add_api_route("/" if name == "page.html" else f"/{name}", lambda path=path: FileResponse(path))

    @app.websocket("/session")
    async def session(websocket: WebSocket) -> None:
        if websocket.headers.get("origin") != f"http://{websocket.headers.get('host')}":
            await websocket.close(1008)
            return
        await stage.welcome(websocket)

    return app


def bind(port: int) -> socket.socket:
    """A socket on loopback; port 0 takes a free one.

    Raises:
        LiveError: the port is taken, or not for us
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen(64)  # a browser may come before the model is loaded: it waits
    except OSError as error:
        listening.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "taken" if error.errno == errno.EADDRINUSE else "reserved for the system"
        raise LiveError(f"--port {port}: {why}; name another one, or 0 for any that is free") from None
    return listening


def configuration(stage: Stage) -> uvicorn.Config:
    return uvicorn.Config(
        application(stage),
        log_level="warning",
        ws="websockets-sansio",
        ws_per_message_deflate=False,  # would take longer than it saves here
        timeout_graceful_shutdown=1,
    )


def serve(
    session: Session,
    models: Callable[[], Awaitable[list[dict[str, str]]]],
    listening: socket.socket,
    open_browser: bool,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM."""
    stage = Stage(session, models)
    url = f"http://{HOST}:{listening.getsockname()[1]}/"
    print(f"{session.model}, level {session.level}: live on {url} (Ctrl-C ends it)", flush=True)
    if open_browser:
        webbrowser.open(url)
    try:
        uvicorn.Server(configuration(stage)).run(sockets=[listening])
    finally:
        stage.close()
