"""The storage types of checkpoints and their conversion to float32, independently of the Rust core.

Every decoder takes quant blocks as a structured array and returns `(blocks, block length)` float32. Products
and sums are rounded where ggml's reference rounds them.

Source: ggml's `ggml-common.h` for the layouts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["STORAGE_TYPES", "StorageType"]

Array = NDArray[Any]


@dataclass(frozen=True)
class StorageType:
    """The layout of one type in a file, and its conversion to float32."""

    block_len: int
    block: np.dtype[Any]
    decode: Callable[[Array], Array]


def _bf16(stored: Array) -> Array:
    # bfloat16 is the upper half of a float32.
    bits = stored.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _number(blocks: Array, field: str = "d") -> Array:
    """Returns a field with one number per block, as a column."""
    return blocks[field].astype(np.float32)[:, None]


def _unpack(packed: Array, bits: int, run: int) -> Array:
    """Unpacks numbers of `bits` bits.

    A run of bytes holds the first numbers in its lowest bits, the next ones in the bits above, and so on.
    """
    blocks = len(packed)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = packed.reshape(blocks, -1, 1, run) >> shifts[:, None] & (2**bits - 1)
    return np.asarray(numbers.reshape(blocks, -1))


def _five_bits(blocks: Array) -> Array:
    high = np.unpackbits(blocks["qh"], axis=1, bitorder="little")
    return np.asarray(_unpack(blocks["qs"], 4, 16) | high << 4)


def _scaled(quants: Array, scales: Array, mins: Array | None = None) -> Array:
    """Returns `quants * scales - mins`, with one scale and one minimum for each run of equal length."""
    grouped = quants.astype(np.float32).reshape(*scales.shape, -1) * scales[..., None]
    if mins is not None:
        grouped -= mins[..., None]
    return np.asarray(grouped.reshape(len(quants), -1))


def _q2_k(blocks: Array) -> Array:
    scales = _number(blocks) * (blocks["scales"] & 15).astype(np.float32)
    mins = _number(blocks, "dmin") * (blocks["scales"] >> 4).astype(np.float32)
    return _scaled(_unpack(blocks["qs"], 2, 32), scales, mins)


def _q3_k(blocks: Array) -> Array:
    low = _unpack(blocks["scales"][:, :8], 4, 8)
    high = _unpack(blocks["scales"][:, 8:], 2, 4)
    scales = _number(blocks) * ((low | high << 4).astype(np.float32) - 32)
    quants = _unpack(blocks["qs"], 2, 32) | _unpack(blocks["qh"], 1, 32) << 2
    return _scaled(quants.astype(np.float32) - 4, scales)


def _scales_and_mins(blocks: Array) -> tuple[Array, Array]:
    """Returns the scales and minimums of Q4_K and Q5_K.

    Each block has eight of both, with 6 bits each. The upper bits of the last four are stored apart.
    """
    first, second, third = np.split(blocks["scales"], 3, axis=1)
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return (
        _number(blocks) * scales.astype(np.float32),
        _number(blocks, "dmin") * mins.astype(np.float32),
    )


def _q5_k(blocks: Array) -> Array:
    quants = _unpack(blocks["qs"], 4, 32) | _unpack(blocks["qh"], 1, 32) << 4
    return _scaled(quants, *_scales_and_mins(blocks))


def _q6_k(blocks: Array) -> Array:
    quants = _unpack(blocks["qs"], 4, 64) | _unpack(blocks["qh"], 2, 32) << 4
    return _scaled(quants.astype(np.float32) - 32, _number(blocks) * blocks["scales"].astype(np.float32))


def _iq4_values(packed: Array) -> Array:
    """Returns the values of nibbles; 16 bytes hold 32 of them."""
    return IQ4_VALUES[_unpack(packed, 4, 16)]


def _iq4_xs(blocks: Array) -> Array:
    low = _unpack(blocks["scales_l"], 4, 1)
    high = _unpack(blocks["scales_h"], 2, 1)
    scales = _number(blocks) * ((low | high << 4).astype(np.float32) - 32)
    return _scaled(_iq4_values(blocks["qs"]), scales)


def _fields(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[Any]:
    return np.dtype(list(fields))


# The values of the quants of IQ4_NL and IQ4_XS, to be multiplied with a scale.
IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)

D, M, DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")

STORAGE_TYPES = {
    "F32": StorageType(1, np.dtype("<f4"), lambda stored: stored),
    "F16": StorageType(1, np.dtype("<f2"), lambda stored: stored.astype(np.float32)),
    "BF16": StorageType(1, np.dtype("<u2"), _bf16),
    "Q8_0": StorageType(
        32,
        _fields(D, ("qs", "i1", 32)),
        lambda blocks: blocks["qs"].astype(np.float32) * _number(blocks),
    ),
    "Q4_0": StorageType(
        32,
        _fields(D, ("qs", "u1", 16)),
        lambda blocks: (_unpack(blocks["qs"], 4, 16).astype(np.float32) - 8) * _number(blocks),
    ),
    "Q4_1": StorageType(
        32,
        _fields(D, M, ("qs", "u1", 16)),
        lambda blocks: (
            _unpack(blocks["qs"], 4, 16).astype(np.float32) * _number(blocks) + _number(blocks, "m")
        ),
    ),
    "Q5_0": StorageType(
        32,
        _fields(D, ("qh", "u1", 4), ("qs", "u1", 16)),
        lambda blocks: (_five_bits(blocks).astype(np.float32) - 16) * _number(blocks),
    ),
    "Q5_1": StorageType(
        32,
        _fields(D, M, ("qh", "u1", 4), ("qs", "u1", 16)),
        lambda blocks: _five_bits(blocks).astype(np.float32) * _number(blocks) + _number(blocks, "m"),
    ),
    "Q2_K": StorageType(256, _fields(("scales", "u1", 16), ("qs", "u1", 64), D, DMIN), _q2_k),
    "Q3_K": StorageType(256, _fields(("qh", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), D), _q3_k),
    "Q4_K": StorageType(
        256,
        _fields(D, DMIN, ("scales", "u1", 12), ("qs", "u1", 128)),
        lambda blocks: _scaled(_unpack(blocks["qs"], 4, 32), *_scales_and_mins(blocks)),
    ),
    "Q5_K": StorageType(
        256, _fields(D, DMIN, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)), _q5_k
    ),
    "Q6_K": StorageType(256, _fields(("qs", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), D), _q6_k),
    "IQ4_NL": StorageType(
        32, _fields(D, ("qs", "u1", 16)), lambda blocks: _iq4_values(blocks["qs"]) * _number(blocks)
    ),
    "IQ4_XS": StorageType(
        256, _fields(D, ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", 128)), _iq4_xs
    ),
}
