"""What a model takes, before it is loaded."""

import os
from typing import Literal

from candle_llama import _core, hub
from candle_llama.llama import check_positive
from candle_llama.types import MemoryEstimate


def estimate_memory(
    source: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    quantize: Literal["q8_0", "q4_0"] | None = None,
    compute: Literal["auto", "exact"] = "auto",
    kv_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto",
    engine: Literal["auto", "cpu", "candle"] = "auto",
    context_length: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> MemoryEstimate:
    """Estimates the memory that `load` takes with the same arguments, without loading the weights.

    Reads the headers of the model's files, which must be there: a hub id is downloaded, as `load` would.

    Args:
        source: As for `load`, like all other arguments.
        device: "auto", "cpu", "cuda", "cuda:0" or "metal".
        dtype: "auto" keeps the type in which the weights are stored.
        quantize: What float matrices are quantised to.
        compute: "exact" keeps keys and values in float32, at twice the size.
        kv_dtype: The type of keys and values; "float32" is twice as large as the others.
        engine: "cpu" maps the weights, "candle" copies and may widen them.
        context_length: Positions of the context; None is the model's own, which `load` shortens where
            memory is short.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub.
        cache_dir: Where downloads are kept.
        local_files_only: Stay off the network.
        progress: Show progress bars if stderr is a terminal.

    Returns:
        Bytes of weights, keys and values, and intermediate results.

    Raises:
        FileNotFoundError: There is no such source, or a part of the model is missing.
        CheckpointError: The files are broken.
        UnsupportedModelError: The model cannot be run exactly.
        ValueError: An argument is out of its range.

    Example:
        >>> import candle_llama
        >>> short, long = (candle_llama.estimate_memory("demo", context_length=n) for n in (1024, 2048))
        >>> long.kv_cache == 2 * short.kv_cache and long.weights == short.weights
        True
    """
    if context_length is not None:
        check_positive("context_length", context_length)
    path = hub.resolve(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        progress=progress,
    )
    return MemoryEstimate(
        **_core.estimate_memory(
            str(path),
            device=device,
            dtype=dtype,
            quantize=quantize,
            compute=compute,
            kv_dtype=kv_dtype,
            engine=engine,
            context_length=context_length,
        )
    )
