"""What all benchmarks have in common: the checkpoint, the engines that can run here, their context."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from candle_llama import _core
from candle_llama.bench.contest import Contestant
from candle_llama.bench.engines import ENGINES
from candle_llama.bench.subject import Subject

# New tokens of the warm-up: enough to have run every step of decoding.
WARM_UP_TOKENS = 4
# Memory of an engine besides the weights: its libraries, activations, the KV cache of one sequence.
OVERHEAD_BYTES = 1 << 30
# Additional positions of the context, for engines that round its length or compute ahead.
CONTEXT_MARGIN = 16


@dataclass(frozen=True)
class Setting:
    """The setting of a benchmark."""

    subject: Subject
    threads: int
    """Threads of every engine."""
    clients: int
    """Sequences that an engine may have to hold at the same time."""
    context_length: int
    """Positions of each sequence."""
    names: tuple[str, ...]
    """All engines that were asked for, `cpu` first."""
    skipped: Mapping[str, str]
    """Those of them that cannot run here, with the reasons."""
    memory_available: int
    """Bytes of memory that are free."""
    machine: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        against: Sequence[str],
        opponents: Sequence[str],
        prompt_tokens: int,
        new_tokens: int,
        threads: int | None,
        clients: int = 1,
    ) -> Self:
        """Reads the checkpoint's properties, and finds out which engines can run it.

        Args:
            path: A folder or a .gguf file.
            against: Names of `opponents`.
            opponents: The engines that this benchmark knows, besides `cpu`.
            prompt_tokens: Length of the longest prompt.
            new_tokens: The most tokens that follow a prompt.
            threads: Threads of every engine; None uses as many as CPU affinity and cgroup quota allow.
            clients: Sequences that an engine may have to hold at the same time.

        Raises:
            FileNotFoundError: If a file of the checkpoint is missing.
            ValueError: If an engine is unknown or the model's context too short.
        """
        if unknown := [name for name in against if name not in opponents]:
            raise ValueError(f"unknown engine {unknown[0]!r}: choose from {', '.join(opponents)}")
        subject = Subject.open(Path(path))
        if prompt_tokens + new_tokens > subject.context_length:
            raise ValueError(
                f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the model's context "
                f"of {subject.context_length}"
            )
        doctor = _core.doctor()
        available = int(doctor["memory_available"])
        names = tuple(dict.fromkeys(["cpu", *against]))
        context_length = min(subject.context_length, prompt_tokens + new_tokens + CONTEXT_MARGIN)
        skipped = {}
        for name in names:
            needed = _memory_needed(name, subject, context_length, clients)
            if reason := ENGINES[name].reason_to_skip(subject):
                skipped[name] = reason
            elif needed > available:
                skipped[name] = (
                    f"needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
                )
        return cls(
            subject=subject,
            threads=threads or int(doctor["threads"]),
            clients=clients,
            context_length=context_length,
            names=names,
            skipped=skipped,
            memory_available=available,
            machine={**doctor, "platform": platform.platform(), "python": platform.python_version()},
        )

    def contestants(self, warm_up: Mapping[str, Any]) -> list[Contestant]:
        """Returns the engines that can run; `warm_up` is the request that each gets first."""
        load = {
            "do": "load",
            "path": str(self.subject.path.absolute()),
            "threads": self.threads,
            "clients": self.clients,
            "context_length": self.context_length,
        }
        return [
            Contestant(name, {**load, "engine": name}, dict(warm_up))
            for name in self.names
            if name not in self.skipped
        ]

    def fits(self, contestants: Sequence[Contestant], further_bytes: int = 0) -> bool:
        """Returns whether all these engines, and so many bytes more, fit into the free memory."""
        needed = [
            _memory_needed(c.engine, self.subject, self.context_length, self.clients) for c in contestants
        ]
        return sum(needed) + further_bytes <= self.memory_available


def check_positive(**numbers: int) -> None:
    """Checks arguments that count something.

    Raises:
        ValueError: If one of them is not positive.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def _memory_needed(name: str, subject: Subject, context_length: int, clients: int) -> int:
    further_sequences = (clients - 1) * context_length * subject.kv_bytes_per_token
    return ENGINES[name].memory_needed(subject) + OVERHEAD_BYTES + further_sequences
