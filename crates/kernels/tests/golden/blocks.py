"""Writes blocks.txt: random blocks of every storage type, and how the `gguf` package dequantises them.

Run this script after adding a type; a test compares the file with its output.
"""

from pathlib import Path

import numpy as np

from candle_llama.bench.storage_types import STORAGE_TYPES

ORDER = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
ORDER += ["IQ4_NL", "IQ4_XS"]
PATH = Path(__file__).with_name("blocks.txt")


def lines() -> str:
    """One line per type: its name, two blocks (or 32 numbers) in hex, the bits of their elements in hex."""
    import gguf

    generator = np.random.default_rng(2026)
    text = ""
    for name in ORDER:
        storage = STORAGE_TYPES[name]
        if storage.block.names is None:
            numbers = generator.standard_normal(32).astype(np.float32)
            raw = gguf.quantize(numbers, gguf.GGMLQuantizationType[name]).tobytes()
        else:
            blocks = np.frombuffer(generator.bytes(2 * storage.block.itemsize), dtype=storage.block).copy()
            for field in ("d", "m", "dmin"):
                if field in storage.block.names:
                    blocks[field] = generator.standard_normal(2).astype(np.float16)
            raw = blocks.tobytes()
        stored = np.frombuffer(raw, dtype={"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
        dequantized = gguf.dequantize(stored[None], gguf.GGMLQuantizationType[name]).astype("<f4")
        text += f"{name} {raw.hex()} {dequantized.tobytes().hex()}\n"
    return text


if __name__ == "__main__":
    PATH.write_text(lines(), encoding="ascii")
