"""Lists of prompts: each with its own parameters, errors and results."""

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from candle_llama import _core, sampling
from candle_llama.sampling import SamplingOptions, SamplingParams
from candle_llama.stream import completion
from candle_llama.types import Completion

Request: TypeAlias = tuple[str | list[int], dict[str, Any]]
"""A prompt and its sampling parameters, for the extension."""

_MOST_STARTED = 1024
"""How many prompts of a list the engine knows at a time."""


def single(params: Any, return_exceptions: bool, progress: bool) -> SamplingParams | None:
    """Returns the parameters of a single prompt; raises TypeError for arguments that only lists have."""
    if return_exceptions or progress or isinstance(params, list | tuple):
        name = "return_exceptions" if return_exceptions else "progress" if progress else "a list of params"
        raise TypeError(f"{name} is for a list of prompts, not for a single prompt")
    found: SamplingParams | None = params
    return found


def requests(
    prompts: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams | None] | None,
    options: SamplingOptions,
    checked: Callable[[Any, str], str | list[int]],
    return_exceptions: bool,
) -> list[Request | Exception]:
    """Combines each prompt with its parameters. With `return_exceptions`, an error takes a prompt's place."""
    given: list[dict[str, Any]]
    if isinstance(params, list | tuple):
        if len(params) != len(prompts):
            raise ValueError(f"there are {len(params)} params for {len(prompts)} prompts")
        given = [sampling.merge(one, options) for one in params]
    else:
        given = [sampling.merge(params, options)] * len(prompts)  # type: ignore[arg-type]
    found: list[Request | Exception] = []
    for index, (prompt, one) in enumerate(zip(prompts, given, strict=True)):
        try:
            found.append((checked(prompt, f"prompt[{index}]"), one))
        except (TypeError, ValueError) as error:
            if not return_exceptions:
                raise
            found.append(error)
    return found


class _Bar:
    """A progress bar on stderr, if it is a terminal."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar: Any = None
        if shown and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import auto  # type: ignore[import-untyped]

            self._bar = auto.tqdm(total=total, unit="prompt")

    def reach(self, count: int) -> None:
        """Shows that so many prompts are done."""
        if self._bar is not None:
            self._bar.update(count - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def run(
    core: _core.Llama, requests: list[Request | Exception], return_exceptions: bool, progress: bool
) -> list[Completion | Exception]:
    """Generates for all requests together, and waits for all.

    An error that is no `Exception`, such as SystemExit of a logits processor, is raised.
    """
    bad = sum(isinstance(request, Exception) for request in requests)
    good = [request for request in requests if not isinstance(request, Exception)]
    bar = _Bar(len(requests), progress)
    try:
        results = iter(
            core.generate_all(
                [prompt for prompt, _ in good],
                [given for _, given in good],
                not return_exceptions,
                (lambda count: bar.reach(bad + count)) if progress else None,
            )
        )
        bar.reach(len(requests))
    finally:
        bar.close()
    return [
        request if isinstance(request, Exception) else _completed(next(results), request[1])
        for request in requests
    ]


def _completed(result: dict[str, Any] | BaseException, given: dict[str, Any]) -> Completion | Exception:
    """Converts a result. An answer that its pydantic model refuses gives the model's error."""
    if isinstance(result, Exception):
        return result
    if isinstance(result, BaseException):
        raise result
    try:
        return completion(result, given)
    except ValueError as error:
        return error


async def gather(
    prepare: Callable[[Request], Awaitable[_core.Request]],
    start: Callable[[_core.Request, dict[str, Any]], Awaitable[Completion]],
    requests: list[Request | Exception],
    return_exceptions: bool,
    progress: bool,
) -> list[Completion | Exception]:
    """Does what `run` does, in an event loop."""
    import asyncio  # Not at the top, see async_stream.py.

    prepared: list[tuple[_core.Request, dict[str, Any]] | Exception] = []
    for request in requests:
        try:
            prepared.append(
                request if isinstance(request, Exception) else (await prepare(request), request[1])
            )
        except Exception as error:
            if not return_exceptions:
                raise
            prepared.append(error)
        # Other tasks have their turn between two prompts.
        await asyncio.sleep(0)
    bar = _Bar(len(requests), progress)
    slots = asyncio.Semaphore(_MOST_STARTED)
    done = 0

    async def one(request: tuple[_core.Request, dict[str, Any]] | Exception) -> Completion | Exception:
        nonlocal done
        try:
            if isinstance(request, Exception):
                return request
            async with slots:
                return await start(*request)
        except Exception as error:
            return error
        finally:
            done += 1
            bar.reach(done)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(request)) for request in prepared]
    finally:
        bar.close()
    return [task.result() for task in tasks]


def raise_first(results: list[Completion | Exception]) -> list[Completion]:
    """Returns the completions, or raises the first error."""
    completions = []
    for result in results:
        if isinstance(result, Exception):
            raise result
        completions.append(result)
    return completions
