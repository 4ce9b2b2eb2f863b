"""Runs the server until it is told to stop."""

import asyncio
import copy
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from candle_llama.server.state import State

# After the grace period, connections have this long to send what ends them.
_END_SECONDS = 5


def run(app: FastAPI, listener: socket.socket, *, log_level: str, grace_seconds: float) -> None:
    """Serves on a socket until SIGINT or SIGTERM.

    Requests that run when the signal comes have `grace_seconds` to end; then, or at a second signal, they end
    with an error.

    Raises:
        KeyboardInterrupt: SIGINT has come. SIGTERM ends the process.
    """
    config = uvicorn.Config(
        app,
        log_level=log_level,
        log_config=_log_config(),
        access_log=log_level in ("debug", "trace", "info"),
        timeout_graceful_shutdown=round(grace_seconds) + _END_SECONDS,
        server_header=False,
        ws="none",
        # With httptools, a request that offers HTTP/2 (Upgrade: h2c, as Java's client does) loses its body,
        # and HTTP/1.0 clients get chunks.
        http="h11",
    )
    server = _Server(config, app.state.server, grace_seconds)
    server.run(sockets=[listener])
    if server.was_interrupted:
        raise KeyboardInterrupt


def listen(host: str, port: int) -> socket.socket:
    """Opens the socket; port 0 is any free port.

    Raises:
        OSError: The address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OSError(error.errno, error.strerror, host) from None
    listener = socket.create_server(address[:2], family=family, backlog=2048)
    # Connections inherit it. Else a response's body would wait until the client acknowledges its head, which
    # takes 40 ms. asyncio sets it only for sockets that were created with the protocol's number.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url(listener: socket.socket) -> str:
    """Returns the URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Says when it is ready, and ends streams properly."""

    def __init__(self, config: uvicorn.Config, state: State, grace_seconds: float) -> None:
        super().__init__(config)
        self._state = state
        self._grace_seconds = grace_seconds
        self.was_interrupted = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the shutdown; a second signal ends the grace period."""
        # Some versions of uvicorn raise KeyboardInterrupt at the end, others return.
        self.was_interrupted |= sig == signal.SIGINT
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._state.stop)
            return
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to serve, then prints the URL."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or []:
            print(url(listener), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more requests, and ends those that run after the grace period."""
        self._state.is_stopping = True
        timer = asyncio.get_running_loop().call_later(self._grace_seconds, self._state.stop)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def _log_config() -> dict[str, Any]:
    """Returns uvicorn's settings, with all messages on stderr: stdout has the URL only."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    for name in ("default", "access"):
        config["formatters"][name]["use_colors"] = sys.stderr.isatty()
    config["loggers"]["candle_llama"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config
