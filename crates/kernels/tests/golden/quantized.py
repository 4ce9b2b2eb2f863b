"""Writes quantized.txt: rows of float32, and the blocks to which the `gguf` package quantises them.

Run this script after adding a type; a test compares the file with its output.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDER = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
PATH = Path(__file__).with_name("quantized.txt")


def rows() -> NDArray[np.float32]:
    """Blocks of 32 that test every rule of rounding, within the range of a half-precision scale."""
    generator = np.random.default_rng(2027)
    normal = generator.standard_normal((24, 32))
    scales = 10.0 ** np.linspace(-12, 4, len(normal))
    halves = np.arange(-16, 16)[None] + np.array([[0.0], [0.5], [0.49999997]])
    rows = [
        normal * scales[:, None],
        np.zeros((1, 32)),
        np.full((1, 32), 0.75),
        np.full((1, 32), -0.75),
        # Scaled numbers at halves, or next to them.
        halves * 127 / 16,
        halves,
        halves / 2,
        np.abs(halves),
        # Two numbers of the same magnitude: the sign of the first counts.
        np.tile([3.0, -3.0, 1.0, -1.5], (1, 8)),
        np.tile([-3.0, 3.0, 1.0, -1.5], (1, 8)),
        # The largest numbers that fit.
        generator.uniform(-65500, 65500, (2, 32)),
        # Denormals together with a larger number, then scales that become denormal halves, then zero.
        np.concatenate([generator.uniform(-1e-40, 1e-40, 31), [1e-35]])[None],
        generator.uniform(-1e-6, 1e-6, (2, 32)),
        generator.uniform(-1e-7, 1e-7, (2, 32)),
        generator.uniform(-1e-36, 1e-36, (2, 32)),
    ]
    return np.concatenate(rows).astype(np.float32)


def quantize(dtype: str, numbers: NDArray[np.float32]) -> bytes:
    """The bytes that the `gguf` package stores."""
    import gguf

    if dtype == "F16":  # NumPy would warn of an overflow
        return numbers.astype("<f2").tobytes()
    blocks: NDArray[Any] = gguf.quantize(numbers, gguf.GGMLQuantizationType[dtype])
    return blocks.tobytes()


def lines() -> str:
    """The rows' bits in hex; then one line per type: its name, the blocks in hex."""
    numbers = rows()
    text = f"rows {numbers.astype('<f4').tobytes().hex()}\n"
    return text + "".join(f"{dtype} {quantize(dtype, numbers).hex()}\n" for dtype in ORDER)


if __name__ == "__main__":
    PATH.write_text(lines(), encoding="ascii")
