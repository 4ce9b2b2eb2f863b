"""What a benchmark finds, as frozen records that become JSON by `dataclasses.asdict`."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from candle_llama.bench.roofline import Roofline


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of what was measured."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Summarises `values`; None if there are none."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Run:
    """One prompt read and continued by one engine."""

    time_to_first_token: float
    """Seconds from handing over the token ids until the first new token is there."""
    prefill_tokens_per_second: float
    """Prompt tokens divided by `time_to_first_token`."""
    decode_seconds: float
    """Seconds from the first new token until the last."""
    decode_tokens_per_second: float | None
    """Tokens that came in `decode_seconds`; None if all came at once."""
    same_tokens: int
    """How many new tokens, from the first on, are those of the first engine in the same round."""


@dataclass(frozen=True)
class EngineResult:
    """What one engine did; either `runs`, or the reason why there are none."""

    engine: str
    skipped: str | None = None
    """Why the engine was not tried, and what would change that."""
    failed: str | None = None
    """What went wrong."""
    versions: dict[str, str] = field(default_factory=dict)
    weights: str | None = None
    """The type in which the engine keeps most of the weights."""
    isa: str | None = None
    """What the engine says about the instructions it uses."""
    import_seconds: Spread | None = None
    load_seconds: Spread | None = None
    peak_memory: int | None = None
    """Bytes: the largest resident size of the engine's own process, mapped files included."""
    runs: tuple[Run, ...] = ()
    time_to_first_token: Spread | None = None
    prefill_tokens_per_second: Spread | None = None
    decode_tokens_per_second: Spread | None = None
    prefill_of_peak: float | None = None
    """The median as a part of what the machine's arithmetic can do; None if that was not measured."""
    decode_of_bandwidth: float | None = None
    """The median as a part of what the machine's memory can do; None if that was not measured."""


@dataclass(frozen=True)
class BenchResult:
    """A whole benchmark: what was measured, where, how, and every engine's result."""

    model: str
    parameters: int
    checkpoint_bytes: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    seed: int
    together: bool
    """Whether the engines stayed loaded side by side; False: for want of memory they took turns."""
    machine: dict[str, Any]
    engines: tuple[EngineResult, ...]
    roofline: Roofline | None = None
    """What the machine can do at most; None if that was not asked for."""

    def engine(self, name: str) -> EngineResult:
        """Returns an engine's result.

        Raises:
            KeyError: If that engine was not asked for.
        """
        for result in self.engines:
            if result.engine == name:
                return result
        raise KeyError(name)
