"""The results of a benchmark, as frozen records that `dataclasses.asdict` converts for JSON."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from candle_llama.bench.roofline import Roofline


@dataclass(frozen=True)
class Spread:
    """The median, the minimum and the maximum of some measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Summarises `values`; None if there are none."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Run:
    """One prompt, processed and continued by one engine."""

    time_to_first_token: float
    """Seconds from handing over the token ids until the first new token arrives."""
    prefill_tokens_per_second: float
    """Prompt tokens divided by `time_to_first_token`."""
    decode_seconds: float
    """Seconds from the first new token until the last."""
    decode_tokens_per_second: float | None
    """Tokens per second during `decode_seconds`; None if all tokens arrived at once."""
    same_tokens: int
    """How many new tokens equal those of the first engine in the same round, before the first difference."""


@dataclass(frozen=True)
class EngineResult:
    """The result of one engine: either `runs`, or the reason why there are none."""

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
    """The fraction of the machine's peak arithmetic in the same round, the median of all; None if unknown."""
    decode_of_bandwidth: float | None = None
    """The fraction of the machine's peak bandwidth in the same round, the median of all; None if unknown."""


@dataclass(frozen=True)
class BenchResult:
    """A whole benchmark: the model, the machine, the settings, and every engine's result."""

    model: str
    parameters: int
    checkpoint_bytes: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    device: str
    """Where the engines ran."""
    threads: int
    seed: int
    together: bool
    """Whether all engines stayed loaded at the same time; False on a GPU, and if memory was too small."""
    machine: dict[str, Any]
    engines: tuple[EngineResult, ...]
    roofline: Roofline | None = None
    """The machine's peaks; None if they were not requested."""

    def engine(self, name: str) -> EngineResult:
        """Returns an engine's result.

        Raises:
            KeyError: If that engine is not in the benchmark.
        """
        for result in self.engines:
            if result.engine == name:
                return result
        raise KeyError(name)
