"""How near an engine comes to what the machine can do: memory when decoding, arithmetic in prefill.

Decoding a token reads every weight once; reading a prompt multiplies every weight with every token.
`candle_llama._core.roofline_peaks` measures how fast that can go at most. Other work of an engine (attention,
norms, sampling) is not counted, so the fractions are, if anything, too low.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from candle_llama.bench.read_checkpoint import StoredTensor

__all__ = ["BUFFER_BYTES", "Peaks", "Roofline", "Work", "peaks_from"]

# Several times what any cache holds: one of 480 MiB gave enough of 512 MiB, read again and again, to raise
# the limit by 6 %.
BUFFER_BYTES = 2 << 30
# Weights of more bytes than this are read from memory for every token, whatever the cache.
MOST_CACHED_BYTES = 512 << 20

# The arithmetic that may be used for weights of a type: the fastest of these is their limit. Other types are
# quantised: there activations may be rounded to bytes.
ARITHMETIC = {"F32": ("f32",), "F16": ("f32",), "BF16": ("bf16", "f32")}
QUANTISED = ("int8", "bf16", "f32")


@dataclass(frozen=True)
class Peaks:
    """What the threads can do at most, from one measurement or the best of several."""

    isa: str
    read_bytes_per_second: float
    int8_operations_per_second: float
    """A multiplication and an addition are two operations."""
    bf16_operations_per_second: float | None
    """None on a processor without instructions for it."""
    f32_operations_per_second: float

    @classmethod
    def best(cls, rounds: Sequence[Self]) -> Self:
        """Takes the best of each: whatever disturbs a measurement makes it slower."""
        bf16 = [
            one.bf16_operations_per_second for one in rounds if one.bf16_operations_per_second is not None
        ]
        return cls(
            rounds[0].isa,
            max(one.read_bytes_per_second for one in rounds),
            max(one.int8_operations_per_second for one in rounds),
            max(bf16, default=None),
            max(one.f32_operations_per_second for one in rounds),
        )

    def operations_per_second(self, arithmetic: Sequence[str]) -> float:
        """The fastest of some kinds of arithmetic."""
        rates = {
            "int8": self.int8_operations_per_second,
            "bf16": self.bf16_operations_per_second,
            "f32": self.f32_operations_per_second,
        }
        return max(rates[name] or 0.0 for name in arithmetic)


@dataclass(frozen=True)
class Work:
    """What a checkpoint asks of every engine, whatever that makes of the weights in memory."""

    bytes_per_token: int
    """Read to decode a token: all matrices as they are stored, the head included. Of the embedding only a row
    is read, unless it is the head."""
    operations_per_prompt_token: Mapping[str, int]
    """Two for each weight of the layers, by the type it is stored in."""
    operations_per_prompt: Mapping[str, int]
    """The same for the head, which is only asked about the last token."""

    @classmethod
    def of(cls, tensors: Mapping[str, StoredTensor]) -> Self:
        """Counts the work by the tensors, which have Hugging Face's names.

        Raises:
            ValueError: If there is no head, or a type is not known.
        """
        head = tensors.get("lm_head.weight") or tensors.get("model.embed_tokens.weight")
        if head is None:
            raise ValueError("neither lm_head.weight nor model.embed_tokens.weight is there")
        matrices = [tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")]
        body: Counter[str] = Counter()
        for tensor in matrices:
            body[tensor.type_name] += 2 * tensor.size
        return cls(
            sum(tensor.stored_bytes for tensor in (*matrices, head)),
            dict(body),
            {head.type_name: 2 * head.size},
        )

    def least_prefill_seconds(self, prompt_tokens: int, peaks: Peaks) -> float:
        """The time that the arithmetic of a prompt takes at the limits."""
        operations = Counter(self.operations_per_prompt)
        for name, number in self.operations_per_prompt_token.items():
            operations[name] += number * prompt_tokens
        return sum(
            number / peaks.operations_per_second(ARITHMETIC.get(name, QUANTISED))
            for name, number in operations.items()
        )


@dataclass(frozen=True)
class Roofline:
    """The machine's limits beside what the checkpoint asks of it."""

    work: Work
    rounds: tuple[Peaks, ...] = ()
    """One measurement for each round."""
    best: Peaks | None = None
    failed: str | None = None
    """Why there are no limits."""
    warnings: tuple[str, ...] = ()
    """Fractions above 1, which cannot be."""

    def decode_fraction(self, tokens_per_second: float) -> float | None:
        """The part of the memory's bandwidth that decoding as fast as that needs."""
        if self.best is None:
            return None
        return self.work.bytes_per_token * tokens_per_second / self.best.read_bytes_per_second

    def prefill_fraction(self, prompt_tokens: int, tokens_per_second: float) -> float | None:
        """The part of the peak of arithmetic that reading a prompt as fast as that needs."""
        if self.best is None:
            return None
        least = self.work.least_prefill_seconds(prompt_tokens, self.best)
        return least * tokens_per_second / prompt_tokens

    def over_limit(self, engine: str, prefill: float | None, decode: float | None) -> list[str]:
        """A line for each fraction above 1: no engine is faster than its machine."""
        bug = "of its limit: a bug in the measurement"
        lines = []
        if prefill is not None and prefill > 1:
            line = f"{engine}: prefill is {prefill:.2f} {bug}"
            lines.append(f"{line}, which may not know an instruction of this processor")
        if decode is not None and decode > 1:
            line = f"{engine}: decode is {decode:.2f} {bug}"
            if self.work.bytes_per_token < MOST_CACHED_BYTES:
                megabytes = self.work.bytes_per_token / 1e6
                line += f", unless a cache keeps the {megabytes:.3g} MB that a token needs"
            lines.append(line)
        return lines


def peaks_from(answer: Mapping[str, Any]) -> Peaks:
    """Picks the limits from a worker's answer."""
    return Peaks(**{name: answer[name] for name in Peaks.__dataclass_fields__})
