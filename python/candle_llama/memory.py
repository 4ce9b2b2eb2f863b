"""Estimates the memory that a model needs, before it is loaded."""

import os
from typing import Unpack

from candle_llama import _core, hub
from candle_llama.options import LOADING, SOURCE, LoadOptions, keywords, pick
from candle_llama.types import MemoryEstimate


@keywords(SOURCE, LOADING)
def estimate_memory(source: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> MemoryEstimate:
    """Estimates the memory that `load` needs with the same arguments, without loading the weights.

    Reads only the headers of the model's files. Files of a hub id are downloaded, as by `load`.

    Args:
        source: As for `load`.
        **options: As for `load`. The default of `context_length` is always the model's own, although `load`
            reduces it if memory is short.

    Returns:
        Bytes of weights, keys and values, and intermediate results.

    Raises:
        FileNotFoundError: The source does not exist, or a part of the model is missing.
        CheckpointError: The files are broken.
        UnsupportedModelError: The model cannot be run exactly.
        ValueError: An argument is out of its range.

    Example:
        >>> import candle_llama
        >>> short, long = (candle_llama.estimate_memory("demo", context_length=n) for n in (1024, 2048))
        >>> long.kv_cache == 2 * short.kv_cache and long.weights == short.weights
        True
    """
    path = hub.resolve(source, **pick(options, SOURCE))
    return MemoryEstimate(**_core.estimate_memory(str(path), pick(options, LOADING)))
