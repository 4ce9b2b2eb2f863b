"""The benchmark: this package's engines against plain NumPy and against other runtimes, on this machine.

`candle-llama bench` is `add_arguments` and `main`; `run_bench` is the same for programs. `numpy_llama` is the
model in NumPy, `synthetic` writes checkpoints of well-known shapes with random weights, `runner` measures.
"""

from candle_llama.bench.command import add_arguments, main
from candle_llama.bench.runner import run_bench

__all__ = ["add_arguments", "main", "run_bench"]
