"""Server-sent events: one JSON object for each, and [DONE] at the end."""

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from candle_llama.errors import CandleLlamaError
from candle_llama.server import errors
from candle_llama.server.errors import ApiError
from candle_llama.server.state import LOG, DisconnectedError, State

# json.dumps would make an encoder for each event.
_ENCODE = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """Returns an event."""
    return f"data: {_ENCODE(content)}\n\n".encode("ascii")


def named_event(content: dict[str, Any]) -> bytes:
    """Returns an event of the Responses API, which has its type as a name too."""
    return f"event: {content['type']}\ndata: {_ENCODE(content)}\n\n".encode("ascii")


class EventStream(Response):
    """Sends events until they end, the client disconnects, or the server stops.

    An error is the last event, because the status has been sent already.

    Args:
        state: The server's state.
        events: What to send.
        leave: Called at the end, whatever it is.
        done: What ends the stream.
        failed: Makes the event of an error.
    """

    def __init__(
        self,
        state: State,
        events: AsyncGenerator[bytes],
        leave: Callable[[], None],
        done: bytes = _DONE,
        failed: Callable[[ApiError], bytes] = lambda error: event(error.body()),
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        # Its length is not known.
        del self.headers["content-length"]
        self._state = state
        self._events = events
        self._leave = leave
        self._done = done
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        try:
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            try:
                await self._state.run(receive, self._send(send))
            except DisconnectedError:
                return
            except ApiError as error:
                await send(_body(self._failed(error)))
            except Exception as error:
                if not isinstance(error, CandleLlamaError):
                    LOG.exception("a stream failed")
                await send(_body(self._failed(errors.of_engine(error))))
            await send(_body(self._done, False))
        finally:
            self._leave()

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            async for data in events:
                await send(_body(data))


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
