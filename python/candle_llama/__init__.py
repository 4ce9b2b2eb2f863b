"""Load and run any Llama-family checkpoint, through Hugging Face's Candle and our own CPU kernels."""

from candle_llama._core import __version__
from candle_llama.async_stream import AsyncStream
from candle_llama.errors import (
    CandleLlamaError,
    CheckpointError,
    ContextLengthError,
    DeviceError,
    GenerationError,
    InternalError,
    UnsupportedModelError,
)
from candle_llama.llama import Llama, load
from candle_llama.memory import estimate_memory
from candle_llama.quantization import quantize
from candle_llama.sampling import SamplingParams
from candle_llama.stream import Stream
from candle_llama.tokenizer import Tokenizer, load_tokenizer
from candle_llama.types import (
    Chunk,
    Completion,
    Config,
    LoadReport,
    LogLikelihood,
    MemoryEstimate,
    Metrics,
    QuantizeReport,
    Score,
    Stats,
    StorageType,
    TokenLogprob,
)

__all__ = [
    "AsyncStream",
    "CandleLlamaError",
    "CheckpointError",
    "Chunk",
    "Completion",
    "Config",
    "ContextLengthError",
    "DeviceError",
    "GenerationError",
    "InternalError",
    "Llama",
    "LoadReport",
    "LogLikelihood",
    "MemoryEstimate",
    "Metrics",
    "QuantizeReport",
    "SamplingParams",
    "Score",
    "Stats",
    "StorageType",
    "Stream",
    "TokenLogprob",
    "Tokenizer",
    "UnsupportedModelError",
    "__version__",
    "estimate_memory",
    "load",
    "load_tokenizer",
    "quantize",
]
