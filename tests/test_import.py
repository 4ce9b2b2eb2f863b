"""Importing the package is quick and imports no heavy packages."""

import subprocess
import sys

UNWANTED = (
    "asyncio",
    "torch",
    "transformers",
    "huggingface_hub",
    "jinja2",
    "fastapi",
    "ray",
    "pyarrow",
    "lm_eval",
)


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_package_imports_no_heavy_packages():
    code = (
        "import sys, candle_llama, candle_llama.integrations; "
        f"print([name for name in {UNWANTED} if name in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_commands_import_no_heavy_packages():
    code = (
        "import sys, candle_llama.cli, candle_llama.cli.generate, candle_llama.cli.chat; "
        f"print([name for name in {(*UNWANTED, 'candle_llama.bench')} if name in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_import_takes_at_most_100_ms_more_than_numpy():
    # Processor time, and the minimum of several runs: the limit applies to this package, not to other load on
    # the machine.
    clock = "time.process_time()"
    code = f"import time, numpy; start = {clock}; import candle_llama; print({clock} - start)"
    assert min(float(run_python(code)) for _ in range(5)) <= 0.1


def test_all_names_are_there():
    code = "import candle_llama; print(all(hasattr(candle_llama, name) for name in candle_llama.__all__))"
    assert run_python(code) == "True"
