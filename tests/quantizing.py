"""What the tests of `quantize` share: how a written file is read, and what a folder holds."""

import os
from pathlib import Path

import candle_llama


def load(path: Path) -> candle_llama.Llama:
    return candle_llama.load(path, device="cpu", engine="cpu", compute="exact")


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
