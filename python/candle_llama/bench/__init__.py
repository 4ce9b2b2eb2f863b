"""The benchmark: compares this package's engines with plain NumPy and other runtimes, on this machine.

`add_arguments` and `main` are the command `candle-llama bench`. Programs call `run_bench` (one prompt at a
time), `run_parallel` (several clients) or `run_llama_bench` (llama-bench's tests). `numpy_llama` is the model
in NumPy, `synthetic` writes checkpoints of well-known shapes with random weights.
"""

from candle_llama.bench.command import add_arguments, main
from candle_llama.bench.llama_bench import run_llama_bench
from candle_llama.bench.parallel import run_parallel
from candle_llama.bench.runner import run_bench

__all__ = ["add_arguments", "main", "run_bench", "run_llama_bench", "run_parallel"]
