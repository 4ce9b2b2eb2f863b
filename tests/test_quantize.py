"""`quantize`: blocks, files, and what other readers make of them."""

import runpy
from pathlib import Path


def test_golden_blocks_are_what_the_script_writes() -> None:
    golden = Path(__file__).parent / "golden" / "quantized.txt"
    script = runpy.run_path(str(golden.with_suffix(".py")))
    assert script["lines"]() == golden.read_text(encoding="ascii"), "run tests/golden/quantized.py"
