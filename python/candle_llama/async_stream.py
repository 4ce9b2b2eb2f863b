"""Reads completions in an event loop, without a thread for each.

The engine posts the numbers of the streams that have something to read to one mailbox per event loop. The
loop watches the mailbox's pipe, and wakes the readers of all posted streams at once. Where a loop cannot
watch a pipe, a thread waits in its place.

asyncio is imported where it is used: it takes half of the package's import time, and most programs have no
event loop.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias

from candle_llama import _core
from candle_llama.stream import NOT_PICKLED, chunk, completion
from candle_llama.types import Chunk, Completion

if TYPE_CHECKING:
    import asyncio

Gap: TypeAlias = Callable[[], float]
"""Gives the seconds between two chunks, on average. Only the last chunk may come sooner."""


class _Wakeups:
    """Wakes the tasks of one event loop whose streams have something to read."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: dict[int, asyncio.Event] = {}
        self._numbers = itertools.count()
        self._mailbox: _core.Mailbox | None = None
        self._watched: int | None = None

    @contextlib.contextmanager
    def watch(self, stream: _core.Stream, whole: bool) -> Iterator[asyncio.Event]:
        """Sets the event whenever the stream has something to read, or only at its end."""
        import asyncio

        mailbox = self._mailbox or self._open()
        number, event = next(self._numbers), asyncio.Event()
        self._events[number] = event
        stream.post_to(mailbox, number, whole)
        try:
            yield event
        finally:
            stream.close()
            del self._events[number]
            if not self._events:
                self._close(mailbox)

    def _open(self) -> _core.Mailbox:
        mailbox = self._mailbox = _core.Mailbox()
        if (descriptor := mailbox.fileno()) is not None:
            # Some event loops cannot watch files.
            with contextlib.suppress(NotImplementedError):
                self._loop.add_reader(descriptor, self._wake, mailbox)
                self._watched = descriptor
        if self._watched is None:
            threading.Thread(target=self._wait, args=(mailbox,), daemon=True).start()
        return mailbox

    def _close(self, mailbox: _core.Mailbox) -> None:
        # What is kept of a loop would keep the loop itself.
        _WAKEUPS.pop(self._loop, None)
        self._mailbox = None
        if self._watched is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._watched)
        mailbox.close()

    def _wake(self, mailbox: _core.Mailbox) -> None:
        for number in mailbox.take():
            if event := self._events.get(number):
                event.set()

    def _wait(self, mailbox: _core.Mailbox) -> None:
        while mailbox.wait():
            done = threading.Event()

            def wake(done: threading.Event = done) -> None:
                self._wake(mailbox)
                done.set()

            try:
                self._loop.call_soon_threadsafe(wake)
            except RuntimeError:
                return  # The loop is closed.
            # Until the mailbox is empty, waiting for it would return at once.
            while not done.wait(1.0):
                if self._loop.is_closed():
                    return


_WAKEUPS: dict[asyncio.AbstractEventLoop, _Wakeups] = {}
"""Those of the event loops that have streams now."""


def _wakeups() -> _Wakeups:
    """Returns those of the running event loop."""
    import asyncio

    loop = asyncio.get_running_loop()
    if (found := _WAKEUPS.get(loop)) is None:
        found = _WAKEUPS[loop] = _Wakeups(loop)
    return found


async def whole(stream: _core.Stream, given: Mapping[str, Any]) -> Completion:
    """Waits for the end of a stream. Cancelling the task stops the work. `given` has its parameters."""
    with _wakeups().watch(stream, True) as ended:
        while True:
            await ended.wait()
            ended.clear()
            if (fields := stream.try_whole()) is not None:
                return completion(fields, given)


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of a completion, as they are generated, for `async for`.

    The generation begins with the first read, and the stream ends with the completion. `aclose`, leaving an
    `async with` block, cancelling the task that reads it, or deleting the object stops it early. A reader
    that is slower than the model gets larger chunks. While nobody reads, the generation pauses after about
    64 tokens.
    """

    def __init__(self, core: _core.Stream, gap: Gap | None = None) -> None:
        """Reads `core`. With a gap, a chunk has all tokens since the last one."""
        self._core = core
        self._chunks = _chunks(core, gap)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Stops generating; the stream then ends. Closing twice is fine."""
        self._core.close()
        # A task that is reading gets the end of the stream.
        if not self._chunks.ag_running:  # type: ignore[attr-defined]
            await self._chunks.aclose()

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def _chunks(stream: _core.Stream, gap: Gap | None) -> AsyncGenerator[Chunk]:
    import asyncio

    loop = asyncio.get_running_loop()
    with _wakeups().watch(stream, False) as readable:
        while not stream.has_ended():
            # What comes from now on sets it again.
            readable.clear()
            # Behind the last chunk there may be an error, for which nobody wakes this task again.
            if (fields := stream.try_next(gap is not None)) is None:
                if not stream.has_ended():
                    await readable.wait()
                continue
            due = _due(loop.time(), gap()) if gap is not None else 0.0
            yield chunk(fields)
            # What was posted before the chunk was read may wake this task too.
            while loop.time() < due:
                readable.clear()
                if stream.is_done():
                    break
                timer = loop.call_at(due, readable.set)
                await readable.wait()
                timer.cancel()


def _due(now: float, gap: float) -> float:
    # The multiple of the gap that is next to the end of it: the streams of one gap then wake the loop, and
    # their client, at the same times.
    return round(now / gap + 1) * gap
