"""The engines that take part in a comparison, and their turns.

Each round begins with another engine, so that heat, other programs and changes of the processor's clock
affect all engines alike.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from candle_llama.bench.process import EngineFailedError, WorkerProcess

# Seconds of pause between two engines: libraries keep threads spinning for a while after their work.
SETTLE_SECONDS = 0.3


@dataclass
class Contestant:
    """An engine that takes part, and its results so far."""

    engine: str
    load_request: dict[str, Any]
    warm_up_request: dict[str, Any]
    worker: WorkerProcess | None = None
    loads: list[dict[str, Any]] = field(default_factory=list)
    answers: list[list[dict[str, Any]]] = field(default_factory=list)
    """For each round, an answer to each of its requests."""
    peak_memory: int | None = None
    failed: str | None = None

    def start(self) -> None:
        """Starts the process, loads the checkpoint, and runs the warm-up."""
        self.worker = WorkerProcess(self.engine, self.load_request["threads"])
        self.loads.append(self._ask(self.load_request))
        self._ask(self.warm_up_request)

    def run(self, requests: Sequence[dict[str, Any]]) -> None:
        """Measures one round."""
        self.answers.append([self._ask(request) for request in requests])

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.worker is not None
        answer = self.worker.ask(request)
        for tokens in _new_tokens(answer):
            if tokens != request["new_tokens"]:
                raise EngineFailedError(f"gave {tokens} new tokens, not {request['new_tokens']}")
        if answer["peak_memory"] is not None:
            self.peak_memory = max(self.peak_memory or 0, answer["peak_memory"])
        return answer


class PeaksProbe(Contestant):
    """Measures the machine's peaks, in turn with the engines."""

    def start(self) -> None:
        """Starts the process."""
        self.worker = WorkerProcess(self.engine, self.load_request["threads"])

    def run(self, requests: Sequence[dict[str, Any]]) -> None:
        """Measures the peaks once; those requests are for engines."""
        self.answers.append([self._ask(self.load_request)])


def take_turns(
    contestants: list[Contestant],
    rounds: Sequence[Sequence[dict[str, Any]]],
    together: bool,
    note: Callable[[str], None] | None,
) -> None:
    """Runs all rounds, and ends all processes.

    Args:
        contestants: The engines.
        rounds: The requests of each round, the same for every engine.
        together: Whether the same processes run through all rounds. Otherwise there is one process at a time,
            and it loads again in every round.
        note: Called with a line about every step.
    """
    tell = note or (lambda line: None)
    try:
        if together:
            for contestant in contestants:
                tell(f"{contestant.engine}: load and warm up")
                with noting_failure(contestant):
                    contestant.start()
        for turn, requests in enumerate(rounds):
            first = turn % max(len(contestants), 1)
            for contestant in contestants[first:] + contestants[:first]:
                if contestant.failed:
                    continue
                tell(f"{contestant.engine}: run {turn + 1} of {len(rounds)}")
                with noting_failure(contestant):
                    if not together:
                        contestant.start()
                    time.sleep(SETTLE_SECONDS)
                    contestant.run(requests)
                if not together:
                    contestant.stop()
    finally:
        for contestant in contestants:
            contestant.stop()


@contextlib.contextmanager
def noting_failure(contestant: Contestant) -> Iterator[None]:
    """Ends the contestant's part if its engine fails in the block, and notes why."""
    try:
        yield
    except EngineFailedError as error:
        contestant.failed = str(error)
        contestant.stop()


def _new_tokens(answer: dict[str, Any]) -> list[int]:
    """Returns the number of new tokens of each prompt in an answer."""
    if "token_ids" in answer:
        return [len(answer["token_ids"])]
    return [sum(count for _, count in served["chunks"]) for served in answer.get("requests", [])]
