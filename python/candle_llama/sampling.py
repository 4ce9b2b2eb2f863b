"""The sampling parameters: one table for Python's keywords, their types, and the command line's flags."""

import dataclasses
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from candle_llama import _core
from candle_llama.options import check_text, shown, suggestion
from candle_llama.structured import check_one, json_schema

OnOverflow = Literal["error", "truncate_left"]

LogitsProcessor: TypeAlias = Callable[
    [npt.NDArray[np.int64], npt.NDArray[np.float32]], npt.NDArray[np.float32] | None
]
"""A function `f(token_ids, logits)`; see `SamplingParams.logits_processors`."""


class SamplingOptions(TypedDict, total=False):
    """The keywords that every generating method takes; `SamplingParams` explains them."""

    max_new_tokens: int | None
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str: bool | None
    seed: int | None
    logprobs: int | None
    ignore_eos: bool | None
    min_new_tokens: int | None
    timeout: float | None
    on_overflow: OnOverflow | None
    skip_special_tokens: bool | None
    cache_salt: str | None
    json_schema: Mapping[str, Any] | type[Any] | str | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    logits_processors: Sequence[LogitsProcessor] | None


_ELSEWHERE = {
    "stream": "llm.stream(prompt) and llm.stream_chat(messages) give the pieces as they are generated",
    "do_sample": "temperature=0 is greedy, and a higher temperature samples",
    "num_return_sequences": "give a list that holds the prompt several times, as in [prompt] * 3",
    "n": "give a list that holds the prompt several times, as in [prompt] * 3",
    "echo": "a completion never holds the prompt; write prompt + completion.text",
    "max_length": "max_new_tokens counts the new tokens alone",
    "repeat_penalty": "it is repetition_penalty here",
    "eos_token_id": "stop_token_ids gives further tokens to stop at",
    "response_format": "json_schema takes a schema or a pydantic model",
    "guided_json": "it is json_schema here",
    "guided_regex": "it is regex here",
    "guided_grammar": "it is grammar here, in Lark",
    "guided_choice": "it is choice here",
    "tools": "llm.chat(messages, tools=...) takes them",
    "messages": "llm.chat(messages) takes them",
}
"""What to do instead of the parameters that other packages have."""


def _parameter(kind: str, help: str, **extra: Any) -> Any:
    return dataclasses.field(metadata={"kind": kind, "help": help, **extra})


@dataclasses.dataclass(frozen=True, slots=True, init=False)
class SamplingParams:
    """How to choose tokens and when to stop; immutable, so that it can be shared and reused.

    A parameter that is None takes its value from the model's `generation_config.json`, or else from the
    defaults: greedy, 256 new tokens, no filter, no penalty. Logits are processed in this order: penalties,
    `logit_bias`, `logits_processors`, the constraint, `temperature`, `top_k`, `top_p`, `min_p`.

    `json_schema`, `regex`, `grammar` and `choice` constrain the answer; at most one may be given. A
    constrained answer is complete unless its `finish_reason` is "length", "timeout" or "cancelled".
    docs/structured.md says what is supported.

    Args:
        **options: The attributes below, by name; `max_tokens` is another name of `max_new_tokens`.

    Attributes:
        max_new_tokens: At most this many new tokens; -1 generates to the end of the context.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the k most likely tokens; 0 or -1 turns the filter off.
        top_p: Keep the most likely tokens whose probabilities add up to p; 1 or -1 turns it off. 0 is an
            error.
        min_p: Keep tokens whose probability is at least this fraction of the highest; 0 or -1 turns it off.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens seen in prompt
            or output.
        presence_penalty: Subtracted once from the logits of tokens seen in the output.
        frequency_penalty: Subtracted from a token's logit for each time it was seen in the output.
        logit_bias: Added to the logits of these token ids.
        stop: Text that ends the completion.
        stop_token_ids: Tokens that end the completion.
        include_stop_str: Leave the stop text in the completion.
        seed: Makes a sampled completion reproducible; 0 is a seed.
        logprobs: Report each token's log-probability and this many alternatives.
        ignore_eos: Continue after the end-of-sequence token.
        min_new_tokens: Do not end on an end-of-sequence or stop token before this many new tokens.
        timeout: Stop after this many seconds.
        on_overflow: What to do with a prompt that exceeds the context: "error", or "truncate_left". That cuts
            its beginning, with a warning, and leaves room for one new token or `min_new_tokens`.
        skip_special_tokens: Leave special tokens, such as those that mark turns, out of the text (default:
            True).
        cache_salt: Only calls with equal salts share the keys and values of equal beginnings of prompts. With
            a secret salt for each user, nobody can learn from the time of an answer what others asked.
        json_schema: The answer is JSON that is valid under this schema: a dict, JSON, or a pydantic model
            (the class). Properties come in the schema's order. `Completion.parsed` has the object.
        regex: The regular expression, in the syntax of Rust's crate `regex`, matches the whole answer.
        grammar: The answer follows this context-free grammar, in llguidance's dialect of Lark.
        choice: The answer is one of these texts.
        logits_processors: Functions `f(token_ids, logits)` that change the logits before a token is drawn.
            They get the ids of prompt and output, int64, and the logits of the next token, float32 of shape
            (vocab_size,). They change the logits in place or return others of the same shape; -inf excludes
            a token. They run on the model's thread with the GIL, and every request waits for them. Their
            exception ends their own request, which raises it.

    Example:
        >>> from candle_llama import SamplingParams
        >>> params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=64)
        >>> params.max_new_tokens
        64

    Raises:
        TypeError: A name is unknown, a value has the wrong type, or both names of `max_new_tokens` are given.
        ValueError: A value is out of its range. What depends on the model, such as the size of its
            vocabulary, is checked when the parameters are used.
    """

    max_new_tokens: int | None = _parameter(
        "int", "at most this many new tokens; -1: to the end of the context (default: 256)"
    )
    temperature: float | None = _parameter("float", "0 is greedy (default: 0)")
    top_k: int | None = _parameter(
        "int", "keep the K most likely tokens; 0 turns it off", metavar="K", filter=True
    )
    top_p: float | None = _parameter(
        "float",
        "keep the likeliest tokens whose probabilities add up to P, above 0; 1 turns it off (0 is an error)",
        metavar="P",
        filter=True,
    )
    min_p: float | None = _parameter(
        "float", "keep tokens that are at least P times as likely as the likeliest", metavar="P", filter=True
    )
    repetition_penalty: float | None = _parameter("float", "penalise tokens in prompt or output; 1 is none")
    presence_penalty: float | None = _parameter("float", "penalise tokens in the output, once per token")
    frequency_penalty: float | None = _parameter("float", "penalise tokens in the output, per occurrence")
    logit_bias: Mapping[int, float] | None = _parameter(
        "bias", "add BIAS to a token's logit; can be repeated", metavar="ID=BIAS"
    )
    stop: str | Sequence[str] | None = _parameter(
        "strings", r"end at this text, in which \n is a line end; can be repeated", metavar="TEXT"
    )
    stop_token_ids: Sequence[int] | None = _parameter("ints", "end at these tokens", metavar="ID,ID")
    include_stop_str: bool | None = _parameter("bool", "leave the stop text in the output")
    seed: int | None = _parameter("seed", "make sampling reproducible", metavar="N")
    logprobs: int | None = _parameter(
        "int", "log-probabilities with N alternatives (needs --json)", metavar="N"
    )
    ignore_eos: bool | None = _parameter("bool", "continue after the end-of-sequence token")
    min_new_tokens: int | None = _parameter("int", "do not end before this many new tokens")
    timeout: float | None = _parameter("float", "stop after this time", metavar="SECONDS")
    on_overflow: OnOverflow | None = _parameter(
        "choice",
        "if a prompt exceeds the context: refuse it, or drop its beginning",
        choices=("error", "truncate_left"),
    )
    skip_special_tokens: bool | None = _parameter(
        "bool", "leave special tokens, such as those that mark turns, out of the text (default)", on=True
    )
    cache_salt: str | None = _parameter(
        "text", "share cached beginnings of prompts only with calls of this salt", metavar="TEXT"
    )
    json_schema: Mapping[str, Any] | type[Any] | str | None = _parameter(
        "schema", "answer with JSON that follows this schema, which is JSON too", metavar="JSON"
    )
    regex: str | None = _parameter(
        "text", "answer with a text that this regular expression matches as a whole", metavar="REGEX"
    )
    grammar: str | None = _parameter("text", "answer with a text of this grammar, in Lark", metavar="LARK")
    choice: Sequence[str] | None = _parameter(
        "texts", "answer with this text, or with another --choice", metavar="TEXT"
    )
    logits_processors: Sequence[LogitsProcessor] | None = _parameter("functions", "")

    def __init__(self, **options: Unpack[SamplingOptions]) -> None:
        values = _checked(options)
        check_one(values)
        for name in FIELDS:
            object.__setattr__(self, name, values.get(name))
        _core.check_sampling(_plain(self.given()))

    def __hash__(self) -> int:
        return hash(tuple(_hashable(getattr(self, name)) for name in FIELDS))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.given(),)

    def given(self) -> dict[str, Any]:
        """Returns the parameters that are not None, by name."""
        return {name: value for name in FIELDS if (value := getattr(self, name)) is not None}


FIELDS: dict[str, dataclasses.Field[Any]] = {
    field.name: field for field in dataclasses.fields(SamplingParams)
}
"""The parameters by name; `metadata` holds kind, help, and other settings of the command line."""


def merge(params: SamplingParams | None, options: SamplingOptions) -> dict[str, Any]:
    """Combines a `SamplingParams` with keywords, which have precedence, for the extension.

    A keyword that is None restores the model's default, except that it turns off the filters `top_k`,
    `top_p` and `min_p`.

    Raises:
        TypeError: `params` is something else, a name is unknown, or a value has the wrong type.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise TypeError(
            f"params must be a SamplingParams, not {type(params).__name__}; "
            "sampling parameters are keywords, as in max_new_tokens=32"
        )
    merged = params.given() if params is not None else {}
    for name, value in _checked(options).items():
        if value is not None:
            merged[name] = value
        elif FIELDS[name].metadata.get("filter"):
            merged[name] = -1
        else:
            merged.pop(name, None)
    check_one(merged)
    return _plain(merged)


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """Converts the values to the types that the extension takes."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _hashable(value: Any) -> Any:
    return frozenset(value.items()) if isinstance(value, dict) else value


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Resolves the alias `max_tokens`, and checks and converts each value."""
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name == "max_tokens":
            if "max_new_tokens" in options:
                raise TypeError("max_tokens is another name of max_new_tokens: give one of them")
            name = "max_new_tokens"
        if name in _ELSEWHERE:
            raise TypeError(f"unknown sampling parameter {name!r}: {_ELSEWHERE[name]}")
        if name not in FIELDS:
            raise TypeError(f"unknown sampling parameter {name!r}{suggestion(name, [*FIELDS, 'max_tokens'])}")
        values[name] = None if value is None else _CONVERTERS[FIELDS[name].metadata["kind"]](name, value)
    return values


def _wrong(name: str, expected: str, value: object) -> TypeError:
    return TypeError(f"{name} must be {expected}, not {type(value).__name__}")


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise _wrong(name, "an int", value) from None


def _int(name: str, value: Any) -> int:
    # The range of the extension's integers; the extension checks narrower ranges.
    return _within(name, _integer(name, value), -(2**63), 2**63)


def _seed(name: str, value: Any) -> int:
    number = _integer(name, value)
    if number == -1:
        raise ValueError("seed: got -1; leave it out, or give None, for another result each time")
    return _within(name, number, 0, 2**64)


def _within(name: str, number: int, least: int, end: int) -> int:
    if not least <= number < end:
        raise ValueError(f"{name}: got {shown(number)}, expected at least {least} and less than {end}")
    return number


def _float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large: {shown(value)}") from None


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "a bool", value)
    return value


def _str(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a str", value)
    check_text(value, name)
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_str(name, value),)
    if not isinstance(value, list | tuple):
        raise _wrong(name, "a str or a list of str", value)
    return tuple(_str(f"{name}[{index}]", item) for index, item in enumerate(value))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise _wrong(name, "a list of str", value)
    return _strings(name, value)


def _functions(name: str, value: Any) -> tuple[LogitsProcessor, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(name, "a list of functions", value)
    for index, function in enumerate(value):
        if not callable(function):
            raise _wrong(f"{name}[{index}]", "a function", function)
    return tuple(value)


def _ints(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(name, "a list of int", value)
    return tuple(_int(f"{name}[{index}]", item) for index, item in enumerate(value))


def _bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _wrong(name, "a dict of token id to number", value)
    return {_int(f"a key of {name}", key): _float(f"{name}[{key}]", bias) for key, bias in value.items()}


_CONVERTERS: dict[str, Callable[[str, Any], Any]] = {
    "int": _int,
    "seed": _seed,
    "float": _float,
    "bool": _bool,
    "choice": _str,
    "text": _str,
    "strings": _strings,
    "texts": _texts,
    "schema": json_schema,
    "functions": _functions,
    "ints": _ints,
    "bias": _bias,
}


def _rebuild(given: SamplingOptions) -> SamplingParams:
    return SamplingParams(**given)
