"""Who may use the server, and counting its responses."""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candle_llama.server import errors
from candle_llama.server.errors import ApiError
from candle_llama.server.metrics import Metrics

# The page holds no secrets; it asks for the key.
_OPEN = ("/", "/health")


class Access:
    """Asks for the API key, except at / and /health, and counts responses.

    Args:
        app: What is protected.
        api_key: The key; None lets everybody in.
        metrics: Where responses are counted.
        paths: The paths by which they are counted; others count as one.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        # A key from a file often has a line end. Clients' keys are stripped too.
        self._key = None if api_key is None else api_key.encode().strip()
        self._metrics = metrics
        self._paths = paths

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

        if self._may_enter(path, scope["headers"]):
            await self._app(scope, receive, counted)
            return
        error = ApiError(401, "the API key is missing or wrong", headers={"WWW-Authenticate": "Bearer"})
        await errors.response(error)(scope, receive, counted)

    def _may_enter(self, path: str, headers: list[tuple[bytes, bytes]]) -> bool:
        if self._key is None or path in _OPEN:
            return True
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # In constant time: the time of an answer tells nothing about the key.
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"
