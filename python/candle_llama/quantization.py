"""Writes a checkpoint as a GGUF file, quantised or not."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Unpack

from candle_llama import _core, hub
from candle_llama.options import (
    SOURCE,
    SourceOptions,
    check_bool,
    check_path,
    check_positive,
    expand_user,
    keywords,
    pick,
)
from candle_llama.types import QuantizeReport, StorageType


@keywords(SOURCE)
def quantize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: str = "q4_0",
    *,
    force: bool = False,
    allow_requantize: bool = False,
    tokenizer: bool = True,
    threads: int | None = None,
    **options: Unpack[SourceOptions],
) -> QuantizeReport:
    """Writes a model as one GGUF file, which llama.cpp reads too.

    Matrices are stored as `dtype`, or as F16 if the length of their rows is no multiple of a quant block of
    32; norms and biases as float32. A name with `_k` is one of llama.cpp's mixtures: like llama.cpp, it gives
    some matrices a larger type, and rows that are no multiple of 256 a type with blocks of 32. The blocks
    equal those of llama.cpp's own quantisers without an importance matrix. The file holds the config, the
    tokenizer and the chat template, but not the sampling defaults, which GGUF readers take from elsewhere.
    Tensors are converted one after the other, a few megabytes at a time. The file gets its name when it is
    complete; until then, and after Ctrl-C or an error, an existing file is unchanged.

    Args:
        source: A folder, a .gguf file, a hub id, or "demo", as for `load`.
        destination: The file to write.
        dtype: "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "f16", "bf16" or "f32"; or a mixture: "q2_k",
            "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m" or "q6_k".
        force: Replace an existing file.
        allow_requantize: Convert tensors that are already quantised, which loses more precision than
            converting the original.
        tokenizer: False leaves the tokenizer out, if GGUF cannot express it.
        threads: Number of threads; None uses the performance cores that CPU affinity and cgroup quota allow.
        **options: `revision`, `token`, `cache_dir`, `local_files_only` and `progress`, as for `load`.

    Returns:
        A report of the written file. Each of its warnings is also a `UserWarning`.

    Raises:
        FileExistsError: The destination exists, and `force` is False.
        FileNotFoundError: The source or the destination's folder does not exist, or a part of the model is
            missing.
        CheckpointError: The files are broken, or a weight is not finite or too large for `dtype`; `tensor`
            names it.
        UnsupportedModelError: GGUF cannot express the model or its tokenizer, or a tensor is already
            quantised; `key` names the reason.
        OSError: The file cannot be written.
        ValueError: An argument is out of its range.

    Example:
        >>> import candle_llama, tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "demo-q8_0.gguf")
        ...     report = candle_llama.quantize("demo", path, "q8_0", allow_requantize=True)
        ...     answer = candle_llama.load(path).generate("The capital of France is", max_new_tokens=1)
        >>> sorted(report.tensors), answer.text
        (['F32', 'Q8_0'], ' Paris')
    """
    if threads is not None:
        check_positive("threads", threads)
    if not isinstance(destination, str | os.PathLike):
        raise TypeError(f"destination must be a path, not {type(destination).__name__}")
    if not isinstance(dtype, str):
        raise TypeError(f"dtype must be a str, not {type(dtype).__name__}")
    for name, value in {
        "force": force,
        "allow_requantize": allow_requantize,
        "tokenizer": tokenizer,
    }.items():
        check_bool(name, value)
    written = expand_user(destination)
    check_path(written, "destination")
    path = hub.resolve(source, **pick(options, SOURCE))
    bar = _Bar() if options["progress"] and sys.stderr is not None and sys.stderr.isatty() else None
    tell: Callable[[int, int], None] | None = bar.show if bar else None
    try:
        fields = _core.quantize(
            str(path),
            str(written),
            dtype=dtype,
            force=force,
            allow_requantize=allow_requantize,
            tokenizer=tokenizer,
            threads=threads,
            progress=tell,
        )
    finally:
        if bar:
            bar.clear()
    for message in fields["warnings"]:
        warnings.warn(message, UserWarning, stacklevel=3)
    tensors = {name: StorageType(**size) for name, size in fields["tensors"].items()}
    return QuantizeReport(**{**fields, "tensors": tensors})


class _Bar:
    """A progress bar on stderr."""

    WIDTH = 30

    def show(self, done: int, total: int) -> None:
        """Draws the bar."""
        full = self.WIDTH * done // max(total, 1)
        line = f"\rquantize [{'#' * full}{' ' * (self.WIDTH - full)}] {100 * done // max(total, 1):3}%"
        sys.stderr.write(line)
        sys.stderr.flush()

    def clear(self) -> None:
        """Removes the bar."""
        sys.stderr.write("\r" + " " * (self.WIDTH + 20) + "\r")
        sys.stderr.flush()
