"""The extension module: the Rust crate's facade. `candle_llama` is the documented way to use it."""

from collections.abc import Callable
from typing import Any, final

import numpy
import numpy.typing

__all__ = [
    "Llama",
    "Stream",
    "Tokenizer",
    "__version__",
    "check_sampling",
    "doctor",
    "estimate_memory",
    "inspect",
    "quantize",
    "roofline_peaks",
]

__version__: str

@final
class Llama:
    def __new__(
        cls,
        path: str,
        *,
        device: str,
        dtype: str,
        quantize: str | None,
        compute: str,
        kv_dtype: str,
        engine: str,
        threads: int | None,
        context_length: int | None,
        strict: bool,
    ) -> Llama: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def load_report(self) -> dict[str, Any]: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    def generate(self, prompt: str | list[int], options: dict[str, Any]) -> dict[str, Any]: ...
    def generate_all(
        self, prompts: list[str | list[int]], options: dict[str, Any]
    ) -> list[dict[str, Any]]: ...
    def stream(self, prompt: str | list[int], options: dict[str, Any]) -> Stream: ...
    def logits(self, token_ids: list[int], last: int | None) -> numpy.typing.NDArray[numpy.float32]: ...
    def score(self, text: str | list[int]) -> dict[str, Any]: ...
    def loglikelihood(self, context: str | list[int], continuation: str | list[int]) -> dict[str, Any]: ...
    def close(self) -> None: ...

@final
class Stream:
    def __iter__(self) -> Stream: ...
    def __next__(self) -> dict[str, Any]: ...
    def close(self) -> None: ...

@final
class Tokenizer:
    @staticmethod
    def open(path: str) -> Tokenizer: ...
    def encode(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...
    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        chat_template: str | None,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: dict[str, Any],
    ) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def kind(self) -> str: ...

def inspect(path: str) -> dict[str, Any]: ...
def estimate_memory(
    path: str,
    *,
    device: str,
    dtype: str,
    quantize: str | None,
    compute: str,
    kv_dtype: str,
    engine: str,
    context_length: int | None,
) -> dict[str, Any]: ...
def quantize(
    source: str,
    destination: str,
    *,
    dtype: str,
    force: bool,
    allow_requantize: bool,
    tokenizer: bool,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]: ...
def roofline_peaks(*, threads: int | None, buffer_bytes: int) -> dict[str, Any]: ...
def check_sampling(given: dict[str, Any]) -> None: ...
def doctor() -> dict[str, Any]: ...
