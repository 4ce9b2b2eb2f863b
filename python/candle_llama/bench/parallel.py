"""Measures engines while several clients use them at the same time.

The load is closed-loop: each client is a thread that sends its next request as soon as its last one has
ended. Every request has another prompt, so that no prefix cache helps. Engines are measured one after the
other, as even the idle threads of one would disturb another.
"""

import itertools
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from candle_llama.bench.contest import Contestant, take_turns
from candle_llama.bench.engines import ENGINES
from candle_llama.bench.setting import WARM_UP_TOKENS, Setting, check_positive

__all__ = ["ParallelEngineResult", "ParallelResult", "Percentiles", "Request", "run_parallel"]


@dataclass(frozen=True)
class Percentiles:
    """The median of some measurements, and what 90 % and 99 % of them do not exceed."""

    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Summarises `values`; None if there are none."""
        if not values:
            return None
        ordered = sorted(values)
        p90, p99 = (ordered[math.ceil(len(ordered) * share / 100) - 1] for share in (90, 99))
        return cls(statistics.median(ordered), p90, p99)


@dataclass(frozen=True)
class Request:
    """One request; times are seconds since the clients started."""

    client: int
    started: float
    ended: float
    time_to_first_token: float
    """Seconds from `started` until the first new token arrived; waiting for other requests counts."""


@dataclass(frozen=True)
class ParallelEngineResult:
    """The result of one engine: either `requests`, or the reason why there are none."""

    engine: str
    skipped: str | None = None
    """Why the engine was not tried, and what would change that."""
    failed: str | None = None
    """What went wrong."""
    one_at_a_time: bool = False
    """Whether the engine serves one request at a time, so that clients wait for each other."""
    versions: dict[str, str] = field(default_factory=dict)
    weights: str | None = None
    """The type in which the engine keeps most of the weights."""
    isa: str | None = None
    """What the engine says about the instructions it uses."""
    load_seconds: float | None = None
    peak_memory: int | None = None
    """Bytes: the largest resident size of the engine's own process, mapped files included."""
    requests: tuple[Request, ...] = ()
    seconds: float | None = None
    """From the start of the clients until the last request ended."""
    requests_per_second: float | None = None
    output_tokens_per_second: float | None = None
    """New tokens of all requests, divided by `seconds`."""
    time_to_first_token: Percentiles | None = None
    """Over all requests, in seconds."""
    token_gap: Percentiles | None = None
    """Seconds between consecutive tokens of a request, over all tokens but those that arrive first.

    Tokens that arrive together share the time since the arrival before them equally.
    """


@dataclass(frozen=True)
class ParallelResult:
    """A whole benchmark with clients: the model, the machine, the settings, and every engine's result."""

    model: str
    parameters: int
    checkpoint_bytes: int
    clients: int
    requests_per_client: int
    prompt_tokens: int
    new_tokens: int
    device: str
    """Where the engines ran."""
    threads: int
    seed: int
    machine: dict[str, Any]
    engines: tuple[ParallelEngineResult, ...]


def run_parallel(
    path: str | os.PathLike[str],
    *,
    clients: int,
    requests: int = 4,
    against: Sequence[str] | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    note: Callable[[str], None] | None = None,
) -> ParallelResult:
    """Compares a device's default engine, on the CPU `cpu`, else `tensor`, with others; clients use each.

    Every engine loads the checkpoint in a fresh process. Each client sends one request to warm up, which is
    not counted. Then all clients send the same seeded prompts of ordinary tokens to every engine, which
    continues them greedily, beyond end-of-sequence tokens.

    Args:
        path: A folder or a .gguf file.
        clients: Threads that send requests.
        requests: Requests of each client.
        against: Names of `engines.opponents`; None takes all of them.
        prompt_tokens: Length of the prompts.
        new_tokens: Tokens to generate for each prompt.
        device: Where every engine runs: "cpu", "cuda", "cuda:1", "metal".
        threads: Threads of every engine; None uses the performance cores that this process may use.
        seed: Seed of the prompts.
        note: Called with a line about every step.

    Returns:
        One result per engine, the default engine first. If an engine is not installed, cannot read the
        checkpoint, does not fit into memory, or fails, its result holds the reason.

    Raises:
        DeviceError: If the device cannot be used here.
        FileNotFoundError: If a file of the checkpoint is missing.
        ValueError: If a number is not positive, an engine unknown, or the context too short.
    """
    check_positive(clients=clients, requests=requests, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    setting = Setting.open(
        path,
        against=against,
        device=device,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
        clients=clients,
        parallel=True,
    )
    subject = setting.subject

    def prompts(turns: Sequence[int], new_tokens: int) -> dict[str, Any]:
        return {
            "do": "serve",
            "clients": [
                [subject.prompt(prompt_tokens, (seed, turn, client)) for turn in turns]
                for client in range(clients)
            ],
            "new_tokens": new_tokens,
        }

    contestants = setting.contestants(warm_up=prompts([requests], min(new_tokens, WARM_UP_TOKENS)))
    subject.warm_page_cache()
    take_turns(contestants, [[prompts(range(requests), new_tokens)]], together=False, note=note)
    results = {c.engine: _result(c, subject.storage_type, new_tokens) for c in contestants}
    results |= {name: ParallelEngineResult(name, skipped=why) for name, why in setting.skipped.items()}
    return ParallelResult(
        model=subject.path.name,
        parameters=subject.parameters,
        checkpoint_bytes=subject.checkpoint_bytes,
        clients=clients,
        requests_per_client=requests,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=setting.device,
        threads=setting.threads,
        seed=seed,
        machine=dict(setting.machine),
        engines=tuple(results[name] for name in setting.names),
    )


def token_gaps(chunks: Sequence[tuple[float, int]]) -> list[float]:
    """Returns the time between consecutive tokens, from the time and the number of tokens of each arrival."""
    return [
        gap
        for (before, _), (now, count) in itertools.pairwise(chunks)
        for gap in [(now - before) / count] * count
    ]


def _result(contestant: Contestant, storage_type: str, new_tokens: int) -> ParallelEngineResult:
    if contestant.failed:
        return ParallelEngineResult(contestant.engine, failed=contestant.failed)
    [[answer]], [load] = contestant.answers, contestant.loads
    served, began = answer["requests"], answer["began"]
    requests = tuple(
        Request(
            client=one["client"],
            started=one["started"] - began,
            ended=one["ended"] - began,
            time_to_first_token=one["chunks"][0][0] - one["started"],
        )
        for one in served
    )
    seconds = max(request.ended for request in requests)
    return ParallelEngineResult(
        contestant.engine,
        one_at_a_time=ENGINES[contestant.engine].one_at_a_time,
        versions=load["versions"],
        weights=load.get("weights", storage_type),
        isa=load["isa"],
        load_seconds=load["load_seconds"],
        peak_memory=contestant.peak_memory,
        requests=requests,
        seconds=seconds,
        requests_per_second=len(requests) / seconds,
        output_tokens_per_second=len(requests) * new_tokens / seconds,
        time_to_first_token=Percentiles.of([request.time_to_first_token for request in requests]),
        token_gap=Percentiles.of([gap for one in served for gap in token_gaps(one["chunks"])]),
    )
