"""What all benchmarks have in common: the checkpoint, the engines that can run here, their context."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from candle_llama import _core
from candle_llama.bench.contest import Contestant
from candle_llama.bench.engines import ENGINES, default_engine, opponents
from candle_llama.bench.subject import Subject
from candle_llama.errors import DeviceError

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
    device: str
    """Where every engine runs: "cpu", "cuda:0" and so on, "metal"."""
    threads: int
    """Threads of every engine."""
    clients: int
    """Sequences that an engine may have to hold at the same time."""
    context_length: int
    """Positions of each sequence."""
    names: tuple[str, ...]
    """All engines that were asked for, the device's default engine first."""
    skipped: Mapping[str, str]
    """Those of them that cannot run here, with the reasons."""
    memory_available: int
    """Bytes of the CPU's memory that are free."""
    machine: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        against: Sequence[str] | None,
        device: str,
        prompt_tokens: int,
        new_tokens: int,
        threads: int | None,
        clients: int = 1,
        parallel: bool = False,
    ) -> Self:
        """Reads the checkpoint's properties, and finds out which engines can run it.

        Args:
            path: A folder or a .gguf file.
            against: Names of `engines.opponents`; None takes all of them.
            device: A name that `find_device` takes.
            prompt_tokens: Length of the longest prompt.
            new_tokens: The most tokens that follow a prompt.
            threads: Threads of every engine; None uses the performance cores that this process may use.
            clients: Sequences that an engine may have to hold at the same time.
            parallel: Whether they are those of several clients.

        Raises:
            DeviceError: If the device cannot be used here.
            FileNotFoundError: If a file of the checkpoint is missing.
            ValueError: If an engine is unknown or the model's context too short.
        """
        device = find_device(device)
        known = opponents(device, parallel=parallel)
        against = known if against is None else against
        if unknown := [name for name in against if name not in known]:
            raise ValueError(
                f"unknown engine {unknown[0]!r}: choose from {', '.join(known)} on device {device}"
            )
        subject = Subject.open(Path(path))
        if prompt_tokens + new_tokens > subject.context_length:
            raise ValueError(
                f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the model's context "
                f"of {subject.context_length}"
            )
        doctor = _core.doctor()
        available = int(doctor["memory_available"])
        names = tuple(dict.fromkeys([default_engine(device), *against]))
        context_length = min(subject.context_length, prompt_tokens + new_tokens + CONTEXT_MARGIN)
        skipped = {}
        for name in names:
            needed = _memory_needed(name, subject, context_length, clients)
            if reason := ENGINES[name].reason_to_skip(subject):
                skipped[name] = reason
            # A GPU's memory is known to the engines only: one that finds too little of it fails.
            elif device == "cpu" and needed > available:
                skipped[name] = (
                    f"needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
                )
        return cls(
            subject=subject,
            device=device,
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
            "device": self.device,
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
        """Returns whether all these engines, and so many bytes more, fit into the free memory.

        On a GPU, whose free memory is not known, they do not.
        """
        needed = [
            _memory_needed(c.engine, self.subject, self.context_length, self.clients) for c in contestants
        ]
        return self.device == "cpu" and sum(needed) + further_bytes <= self.memory_available


def find_device(device: str) -> str:
    """Returns a device's full name, as `doctor` lists it: "cuda" is "cuda:0".

    Raises:
        DeviceError: If this build of the package cannot use it on this machine.
    """
    devices: list[str] = _core.doctor()["devices"]
    name = "cuda:0" if device == "cuda" else device
    if name not in devices:
        raise DeviceError(
            f"device {device!r} is not one that this build can use here: {', '.join(devices)}",
            hint="a GPU needs a build with the feature cuda or metal, and its driver",
            device=device,
        )
    return name


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
