"""Compares engines with the machine's peaks: memory bandwidth for decode, arithmetic for prefill.

Decoding a token reads every weight once; prefill multiplies every weight with every token of the prompt.
`candle_llama._core.roofline_peaks` measures how fast the machine can do either. Other work of an engine
(attention, norms, sampling) is not counted, so the fractions are, if anything, too low.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from candle_llama.bench.read_checkpoint import StoredTensor

__all__ = ["BUFFER_BYTES", "Peaks", "Roofline", "Work", "peaks_from"]

# Several times the size of any cache: with a cache of 480 MiB, reading 512 MiB again and again raised the
# measured bandwidth by 6 %.
BUFFER_BYTES = 2 << 30
# No cache keeps more weights than this: each token reads them from memory.
MOST_CACHED_BYTES = 512 << 20

# The kinds of arithmetic that may be used for a type of weights; the fastest of them is the peak. Other types
# are quantised: their activations may be rounded to 8 bits.
ARITHMETIC = {"F32": ("f32",), "F16": ("f32",), "BF16": ("bf16", "f32")}
QUANTISED = ("int8", "bf16", "f32")


@dataclass(frozen=True)
class Peaks:
    """The peaks of the threads, from one measurement or the best of several."""

    isa: str
    read_bytes_per_second: float
    int8_operations_per_second: float
    """A multiplication and an addition are two operations."""
    bf16_operations_per_second: float | None
    """None on a processor without instructions for it."""
    f32_operations_per_second: float

    @classmethod
    def best(cls, rounds: Sequence[Self]) -> Self:
        """Returns the maximum of each peak, because disturbances only make a measurement slower."""
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
        """Returns the highest peak of some kinds of arithmetic."""
        rates = {
            "int8": self.int8_operations_per_second,
            "bf16": self.bf16_operations_per_second,
            "f32": self.f32_operations_per_second,
        }
        return max(rates[name] or 0.0 for name in arithmetic)


@dataclass(frozen=True)
class Work:
    """The work that a checkpoint needs from every engine, whatever types the engine converts weights to."""

    bytes_per_token: int
    """Bytes read to decode a token: all matrices in their stored types, including the output head. Only one
    row of the embedding is read, unless it is also the head."""
    operations_per_prompt_token: Mapping[str, int]
    """Two operations for each weight of the layers, by storage type."""
    operations_per_prompt: Mapping[str, int]
    """The same for the output head, which is needed only for the last token."""

    @classmethod
    def of(cls, tensors: Mapping[str, StoredTensor]) -> Self:
        """Counts the work of a checkpoint from its tensors, by Hugging Face's names.

        Raises:
            ValueError: If there is no head, or a type is not known.
        """
        head = tensors.get("lm_head.weight") or tensors.get("model.embed_tokens.weight")
        if head is None:
            raise ValueError("there is neither lm_head.weight nor model.embed_tokens.weight")
        matrices = [tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")]
        body: Counter[str] = Counter()
        for tensor in matrices:
            body[tensor.type_name] += 2 * tensor.size
        return cls(
            sum(tensor.stored_bytes for tensor in (*matrices, head)),
            dict(body),
            {head.type_name: 2 * head.size},
        )

    def decode_fraction(self, tokens_per_second: float, peaks: Peaks) -> float:
        """Returns the fraction of the peak bandwidth that decoding at this speed needs."""
        return self.bytes_per_token * tokens_per_second / peaks.read_bytes_per_second

    def prefill_fraction(self, prompt_tokens: int, tokens_per_second: float, peaks: Peaks) -> float:
        """Returns the fraction of the peak arithmetic that prefill at this speed needs."""
        return self.least_prefill_seconds(prompt_tokens, peaks) * tokens_per_second / prompt_tokens

    def least_prefill_seconds(self, prompt_tokens: int, peaks: Peaks) -> float:
        """Returns the time that the arithmetic of a prompt takes at the peaks."""
        operations = Counter(self.operations_per_prompt)
        for name, number in self.operations_per_prompt_token.items():
            operations[name] += number * prompt_tokens
        return sum(
            number / peaks.operations_per_second(ARITHMETIC.get(name, QUANTISED))
            for name, number in operations.items()
        )

    def above_peak(self, engine: str, prefill: float | None, decode: float | None) -> list[str]:
        """Returns a message for each fraction above 1: no engine is faster than its machine."""
        bug = "of the peak: a bug in the measurement"
        lines = []
        if prefill is not None and prefill > 1:
            line = f"{engine}: prefill is {prefill:.2f} {bug}"
            lines.append(f"{line}, which may not know an instruction of this processor")
        if decode is not None and decode > 1:
            line = f"{engine}: decode is {decode:.2f} {bug}"
            if self.bytes_per_token < MOST_CACHED_BYTES:
                megabytes = self.bytes_per_token / 1e6
                line += f", unless a cache keeps the {megabytes:.3g} MB that a token needs"
            lines.append(line)
        return lines


@dataclass(frozen=True)
class Roofline:
    """The machine's peaks, and the work that the checkpoint needs."""

    work: Work
    rounds: tuple[Peaks, ...] = ()
    """One measurement for each round."""
    best: Peaks | None = None
    """The highest of all rounds."""
    failed: str | None = None
    """Why there are no peaks."""
    warnings: tuple[str, ...] = ()
    """Messages about fractions above 1, which are impossible."""


def peaks_from(answer: Mapping[str, Any]) -> Peaks:
    """Returns the peaks in a worker's answer."""
    return Peaks(**{name: answer[name] for name in Peaks.__dataclass_fields__})
