"""Runs the processes of a test's cases at the same time, one for each processor."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest

Outcome = TypeVar("Outcome")


@contextmanager
def side_by_side(
    request: pytest.FixtureRequest, test: str, run: Callable[..., Outcome]
) -> Iterator[dict[str, Future[Outcome]]]:
    """What ``run(**parameters)`` returns or raises, for all cases of ``test`` that were selected.

    For a fixture of the module. The keys are the cases' ``nodeid``. ``run`` should start a process and wait
    for it. Its limits are on processor time; a timeout only ends what hangs, as the processes share the
    machine.
    """
    cases = [
        item for item in request.session.items if item.path == request.path and item.originalname == test
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            yield {case.nodeid: pool.submit(run, **case.callspec.params) for case in cases}
        finally:
            pool.shutdown(cancel_futures=True)
