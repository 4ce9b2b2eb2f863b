"""Starts answers in the model's engine, and reads them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TypeAlias

from candle_llama import async_stream
from candle_llama.async_stream import AsyncStream
from candle_llama.errors import ContextLengthError
from candle_llama.server import errors
from candle_llama.server.state import State
from candle_llama.types import Chunk, Completion

_LONG_WORK = 20_000
"""Requests with more bytes are tokenised in a thread, so that the other requests do not wait for it."""

# Events cost processor time, here and at the client. With one for each token, a small model that answers 16
# clients on two cores loses a seventh of its speed.
_LEAST_GAP = 0.016
_GAP_PER_ANSWER = 0.003
_MOST_GAP = 0.05
"""Seconds between two events of an answer: 3 ms for each answer, at least 16 ms, a frame of a screen, and at
most 50 ms."""

Start: TypeAlias = Callable[[], list[AsyncStream]]


async def start(state: State, begin: Start, work_bytes: int, fields: Mapping[str, str]) -> list[AsyncStream]:
    """Starts the answers of a request.

    Args:
        state: The model.
        begin: Starts them.
        work_bytes: What `begin` reads: the request's size, once for each answer to a prompt.
        fields: The fields of the request that the engine knows by other names.

    Raises:
        ApiError: The engine does not accept the request, or the model is closed.
    """
    try:
        return await asyncio.to_thread(begin) if work_bytes > _LONG_WORK else begin()
    except (ContextLengthError, ValueError, TypeError) as error:
        state.check_ready()
        raise errors.of_request(error, fields) from None


async def whole(streams: Sequence[AsyncStream]) -> list[Completion]:
    """Waits for the ends of all answers. Cancelling the task, or an error of one, stops all."""
    # A task for each: an answer that nobody waits for would pause. Clients parse the texts themselves.
    tasks = [asyncio.create_task(async_stream.whole(stream._core, {})) for stream in streams]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def pieces(state: State, streams: Sequence[AsyncStream]) -> AsyncGenerator[tuple[int, Chunk]]:
    """Yields the pieces of all answers as they come, each with the index of its answer.

    Closing the iterator stops all answers. A slow reader slows them down.
    """

    def gap() -> float:
        return min(max(_LEAST_GAP, _GAP_PER_ANSWER * state.queue.length), _MOST_GAP)

    streams = [AsyncStream(stream._core, gap) for stream in streams]
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as stream:
            async for chunk in stream:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(1)

    async def read(index: int, stream: AsyncStream) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for chunk in stream:
                    await queue.put((index, chunk))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(read(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield index, item
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
