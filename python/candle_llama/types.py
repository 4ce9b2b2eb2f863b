"""The frozen records that methods return: results, statistics and load reports."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn

FinishReason = Literal["stop", "length", "timeout", "cancelled"]

Message = Mapping[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "..."}`, with the keys the chat template knows."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability, from the logits before any processing.

    Attributes:
        token_id: The token that was chosen.
        logprob: Its log-probability.
        top: The likeliest tokens as (token id, log-probability), best first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """Counts and times of one completion.

    Attributes:
        prompt_tokens: Tokens in the prompt.
        cached_tokens: Prompt tokens whose keys and values were in the prefix cache, and not computed again.
        completion_tokens: Tokens generated.
        time_to_first_token: Seconds from the call to the first token; None if there was none.
        prefill_seconds: Seconds of the forward passes that processed the prompt. Prompts of a batch share
            forward passes; each counts the whole time.
        decode_seconds: Seconds of the forward passes after the first token, shared in the same way.
        prefill_tokens_per_second: Prompt tokens per second; None if none was processed.
        decode_tokens_per_second: New tokens per second after the first; None without a second one.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    time_to_first_token: float | None
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion; the prompt is never part of it.

    Attributes:
        text: The generated text, without the stop string or token that ended it.
        token_ids: The generated tokens, with the token that ended them.
        finish_reason: "stop" (end of sequence, stop string or stop token, or a constrained answer is
            complete), "length", "timeout" or "cancelled".
        stop_reason: The element of `stop` or `stop_token_ids` that ended it; None for an end token.
        prompt_tokens: Tokens in the prompt.
        logprobs: One entry for each of `token_ids`, if `logprobs` was given.
        stats: Counts and times.
        parsed: What a complete answer stands for: with `json_schema` the JSON value, or the instance of the
            pydantic model; with `choice` the text. None without them, and if `finish_reason` is not "stop".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None
    stats: Stats
    parsed: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a completion while it is generated. The joined texts of all chunks are the whole text.

    Attributes:
        text: The text that is final by now; may be empty while a character or a possible stop string is
            incomplete.
        token_ids: The tokens generated since the last chunk: one, or more if the reader is slower than the
            model.
        finish_reason: Why the completion ended, on the last chunk; else None.
        stop_reason: The element of `stop` or `stop_token_ids` that ended it, on the last chunk; else None.
        logprobs: One entry for each of `token_ids`, if `logprobs` was given.
        stats: Counts and times, on the last chunk; else None.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None
    stats: Stats | None


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """How likely a text is, token by token.

    Attributes:
        logprobs: The natural log-probability of each token given those before it, from the logits before
            any processing. The first is None: nothing comes before it.
        perplexity: The exponential of the negative mean of `logprobs`, without the first.
        token_ids: The text's tokens, one for each of `logprobs`.
    """

    logprobs: list[float | None]
    perplexity: float
    token_ids: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class LogLikelihood:
    """How likely a continuation is after a context.

    Attributes:
        sum: The natural logarithm of the continuation's probability: the sum of `logprobs`.
        is_greedy: Whether greedy decoding would give exactly this continuation.
        logprobs: The natural log-probability of each of the continuation's tokens.
        token_ids: The continuation's tokens.
    """

    sum: float
    is_greedy: bool
    logprobs: list[float]
    token_ids: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The memory that a model needs, in bytes.

    Attributes:
        weights: All weights, in their types in memory. Memory-mapped weights count too: the model is only
            fast while they stay in memory.
        kv_cache: Keys and values of one sequence that fills the context.
        scratch: Scratch buffers for intermediate results, at their largest.
        total: The sum of these.
        context_length: Length of the context in tokens.
        engine: "cpu", "tensor" or "candle".
    """

    weights: int
    kv_cache: int
    scratch: int
    total: int
    context_length: int
    engine: str


@dataclasses.dataclass(frozen=True, slots=True)
class Metrics:
    """What a model's engine does and has done; a snapshot.

    Attributes:
        running: Requests that take part in forward passes.
        waiting: Requests that wait for their turn or for a slow reader.
        blocks_used: KV blocks, of 64 tokens each, that requests hold.
        blocks_free: KV blocks that can be taken.
        blocks_cached: Free KV blocks that a later prompt with an equal beginning may reuse.
        prefix_hits: Prompts so far that began with cached KV blocks.
        tokens_in: Tokens of all prompts so far.
        tokens_cached: Tokens of prompts so far that were cached.
        tokens_out: Tokens generated so far.
        ended: Requests that have ended, for whatever reason.
        preemptions: How often a request lost its KV blocks to an older one and was computed again.
        busy_seconds: Time spent in forward passes and sampling.
    """

    running: int
    waiting: int
    blocks_used: int
    blocks_free: int
    blocks_cached: int
    prefix_hits: int
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    ended: int
    preemptions: int
    busy_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class StorageType:
    """How much of a model is stored in one tensor type.

    Attributes:
        count: Number of tensors.
        bytes: Their size.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizeReport:
    """A report of the file that `quantize` wrote.

    Attributes:
        path: The file.
        bytes: Its size.
        seconds: The time it took.
        tensors: Tensor types in the file, by name such as "F32" or "Q4_0".
        warnings: Properties of the model that the file cannot express, and problems of the source.
        notes: Other remarks, such as tensors that are stored in another type.
    """

    path: str
    bytes: int
    seconds: float
    tensors: dict[str, StorageType]
    warnings: list[str]
    notes: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class LoadReport:
    """How `load` loaded a model.

    Attributes:
        engine: "cpu", "tensor" or "candle".
        device: Where the model runs.
        compute: "auto" or "exact".
        kv_dtype: The type of cached keys and values: "float16", "bfloat16", "float32" or "q8_0".
        lm_head: "separate", or "tied" if the embedding is the output head.
        lm_head_reason: Why it is separate or tied.
        storage: Tensor types in memory, by name such as "BF16" or "Q4_1".
        warnings: Problems that did not prevent loading; each was also a `UserWarning`.
        notes: Remarks about the model that are no problems.
        seconds: Loading time, without downloads.
        bytes: Size of all weights.
        isa: The ISA of the CPU kernels; None for the candle engine.
        threads: Number of threads.
    """

    engine: str
    device: str
    compute: str
    kv_dtype: str
    lm_head: Literal["separate", "tied"]
    lm_head_reason: str
    storage: dict[str, StorageType]
    warnings: list[str]
    notes: list[str]
    seconds: float
    bytes: int
    isa: str | None
    threads: int


class Config(Mapping[str, Any]):
    """A model's configuration: all fields as config.json names them, plus derived ones; immutable.

    Every field is both an attribute and a mapping item. Lists and dicts are returned as copies.

    Example:
        >>> import candle_llama
        >>> llm = candle_llama.load("demo")
        >>> llm.config.num_hidden_layers, llm.config["num_key_value_heads"]
        (30, 3)
    """

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_values", copy.deepcopy(dict(values)))

    def __getitem__(self, name: str) -> Any:
        return copy.deepcopy(self._values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        # Called only if there is no such attribute. `copy` looks up private names before `_values` exists.
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"the config has no field {name!r}", name=name, obj=self)
        return self[name]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"the config is frozen: cannot set {name!r}", name=name, obj=self)

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"the config is frozen: cannot delete {name!r}", name=name, obj=self)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (self._values,)

    def to_dict(self) -> dict[str, Any]:
        """Returns a copy of all fields, as a dict."""
        return copy.deepcopy(self._values)
