"""What all requests to one server share."""

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.types import Receive

from candle_llama.errors import CandleLlamaError, InternalError
from candle_llama.llama import Llama
from candle_llama.server.errors import ApiError
from candle_llama.server.limits import Limits, Queue
from candle_llama.server.logprobs import TokenTexts
from candle_llama.server.metrics import Metrics

LOG = logging.getLogger("candle_llama.server")

_T = TypeVar("_T")


class DisconnectedError(Exception):
    """The client has closed its connection."""


@dataclasses.dataclass
class State:
    """The model, and the requests that use it.

    Attributes:
        llm: The model.
        name: Its name for clients.
        created: When the server started, in seconds since 1970.
        limits: What clients may ask for.
        queue: The answers that run or wait.
        metrics: What /metrics shows.
        is_dead: The model has failed for good.
        is_stopping: The server shuts down: it accepts no new requests.
        scorer: Scores prompts, one at a time: each may take much memory.
    """

    llm: Llama
    name: str
    created: int
    limits: Limits
    queue: Queue
    metrics: Metrics
    is_dead: bool = False
    is_stopping: bool = False
    # A thread and not a lock: what a cancelled request has begun ends there before the next one begins.
    scorer: ThreadPoolExecutor = dataclasses.field(default_factory=lambda: ThreadPoolExecutor(1, "scorer"))
    _tasks: set[asyncio.Task[Any]] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def token_texts(self) -> TokenTexts:
        """The texts of single tokens."""
        return TokenTexts(self.llm.tokenizer)

    def check_ready(self) -> None:
        """Raises status 503 if no request can be answered."""
        if self.is_stopping:
            raise _stopping()
        if self.is_dead:
            raise ApiError(503, "the model has failed; restart the server")
        try:
            self.llm.metrics()
        except (CandleLlamaError, ValueError) as error:
            raise ApiError(503, str(error)) from None

    def check_model(self, name: str | None) -> None:
        """Raises status 404 for the name of another model."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def note(self, error: BaseException) -> None:
        """Remembers if an error means that the model has failed for good."""
        if isinstance(error, InternalError):
            self.is_dead = True
            LOG.error("the model has failed: %s", error)

    def stop(self) -> None:
        """Ends the requests that still run, as after a failure."""
        self.is_stopping = True
        for task in self._tasks:
            task.cancel()

    async def run(self, receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs a request's work until it ends, the client disconnects, or the server stops.

        Starlette does not notice the disconnect of a request that it does not stream, so this reads
        `receive` itself. The request's body must have been read.

        Raises:
            DisconnectedError: The client is gone; the work was cancelled.
            ApiError: The server stops, or the model was closed; the work was cancelled.
        """
        task = asyncio.create_task(work)
        watcher = asyncio.create_task(_disconnected(receive))
        self._tasks.add(task)
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise DisconnectedError
            if task.cancelled():
                raise _stopping()
            if isinstance(task.exception(), ValueError):
                # It may be that the model was closed.
                self.check_ready()
            return task.result()
        finally:
            self._tasks.discard(task)
            task.cancel()
            watcher.cancel()
            await asyncio.wait({task, watcher})
            if not task.cancelled() and (error := task.exception()):
                self.note(error)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", headers={"Retry-After": "5"})
