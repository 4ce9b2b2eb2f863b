"""The benchmark: compares this package's engines with plain NumPy and other runtimes, on this machine.

`add_arguments` and `main` are the command `candle-llama bench`; programs call `run_bench`. `runner` measures,
`numpy_llama` is the model in NumPy, `synthetic` writes checkpoints of well-known shapes with random weights.
"""

from candle_llama.bench.command import add_arguments, main
from candle_llama.bench.runner import run_bench

__all__ = ["add_arguments", "main", "run_bench"]
