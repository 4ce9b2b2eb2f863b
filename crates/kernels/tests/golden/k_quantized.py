"""Writes k_quantized.txt: rows of float32, and the blocks of the K types to which ggml quantises them.

The `gguf` package has no quantisers for the K types, so this needs llama-cpp-python on x86-64. There ggml's
quantisers are compiled without fused products and sums, even in a native build. Elsewhere a few blocks
differ.
"""

import ctypes
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Names, and ggml's numbers.
TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
PATH = Path(__file__).with_name("k_quantized.txt")
BLOCK = 256


def rows() -> NDArray[np.float32]:
    """Blocks of 256: common distributions, and numbers at which the searches have a special case."""
    generator = np.random.default_rng(2028)
    normal = generator.standard_normal((5, BLOCK))
    group_scales = np.repeat(10.0 ** generator.uniform(-12, 3, BLOCK // 16), 16)
    rows = [
        normal * np.array([[1e-3], [0.02], [1.0], [1e3], [0.02]]),
        0.02 * generator.standard_t(2, BLOCK)[None],
        # Without a minimum, without a positive number, with a range much smaller than the numbers.
        generator.uniform(0, 1, (1, BLOCK)),
        generator.uniform(-1, 0, (1, BLOCK)),
        generator.uniform(-1, -0.999, (1, BLOCK)),
        # Numbers at halves of quants, groups of equal numbers, of few numbers, of almost equal ones.
        (generator.integers(-64, 64, BLOCK) / 2)[None],
        np.repeat(generator.standard_normal(BLOCK // 32), 32)[None],
        (generator.standard_normal(BLOCK) * (generator.random(BLOCK) < 0.05))[None],
        (generator.integers(-2, 3, BLOCK) * 1.2e-7 - 1)[None],
        # Groups of different scales; scales that become zero as halves; denormals; zeros.
        generator.standard_normal(BLOCK)[None] * group_scales,
        generator.standard_normal(BLOCK)[None] * 10.0 ** np.linspace(-16, -5, BLOCK),
        generator.standard_normal(BLOCK)[None] * 1e-39,
        np.zeros((1, BLOCK)),
    ]
    return np.concatenate(rows).astype(np.float32)


def quantize(dtype: str, numbers: NDArray[np.float32]) -> bytes:
    """The bytes that ggml stores."""
    from llama_cpp import llama_cpp
    from llama_cpp._ggml import libggml

    libggml.ggml_row_size.restype = ctypes.c_size_t
    libggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    libggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    llama_cpp.llama_backend_init()
    count, cols = numbers.shape
    out = ctypes.create_string_buffer(count * libggml.ggml_row_size(TYPES[dtype], cols))
    libggml.ggml_quantize_chunk(TYPES[dtype], numbers.ctypes.data, out, 0, count, cols, None)
    return out.raw


def lines() -> str:
    """The rows' bits in hex; then one line per type: its name, the blocks in hex."""
    numbers = rows()
    text = f"rows {numbers.astype('<f4').tobytes().hex()}\n"
    return text + "".join(f"{dtype} {quantize(dtype, numbers).hex()}\n" for dtype in TYPES)


if __name__ == "__main__":
    PATH.write_text(lines(), encoding="ascii")
