"""Who may use the server, by key and by host name, and counting its responses."""

import hmac
from collections.abc import Collection
from typing import TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candle_llama.server import errors
from candle_llama.server.errors import ApiError
from candle_llama.server.metrics import Metrics

# The page holds no secrets; it asks for the key.
_OPEN = ("/", "/health")

_Headers: TypeAlias = list[tuple[bytes, bytes]]


class Access:
    """Asks for the API key, except at / and /health, refuses other host names, and counts responses.

    Args:
        app: What is protected.
        api_key: The key; None lets everybody in.
        metrics: Where responses are counted.
        paths: The paths by which they are counted; others count as one.
        hosts: The names that the header Host may have, in lower case; None allows all.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        metrics: Metrics,
        paths: frozenset[str],
        hosts: Collection[str] | None = None,
    ) -> None:
        self._app = app
        # A key from a file often has a line end. Clients' keys are stripped too.
        self._key = None if api_key is None else api_key.encode().strip()
        self._metrics = metrics
        self._paths = paths
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        # Where the application is mounted, the path begins with that place.
        path = scope["path"].removeprefix(scope.get("root_path", ""))

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.response(path if path in self._paths else "other", message["status"])
            await send(message)

        try:
            self._check_host(scope["headers"])
            self._check_key(path, scope["headers"])
        except ApiError as error:
            await errors.response(error)(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)

    def _check_host(self, headers: _Headers) -> None:
        # A page of another site can point its own name at this server (DNS rebinding). For the browser, the
        # page and the server are then the same site, but Host has the page's name. Browsers always send it.
        given = _header(headers, b"host").decode("latin-1").lower()
        name = given[1:].partition("]")[0] if given.startswith("[") else given.partition(":")[0]
        if self._hosts is not None and given and name not in self._hosts:
            message = f"the host {errors.shown(name)} is not accepted: set an API key, or give it as --host"
            raise ApiError(403, message, param="Host")

    def _check_key(self, path: str, headers: _Headers) -> None:
        if self._key is None or path in _OPEN:
            return
        given = _header(headers, b"authorization")
        scheme, _, key = given.partition(b" ")
        # In constant time: the time of an answer tells nothing about the key.
        if not hmac.compare_digest(key.strip(), self._key) or scheme.lower() != b"bearer":
            raise ApiError(401, "the API key is missing or wrong", headers={"WWW-Authenticate": "Bearer"})


def _header(headers: _Headers, wanted: bytes) -> bytes:
    return next((value for name, value in headers if name == wanted), b"")
