"""The options for finding and loading a model: one table for keywords and for the command line's flags."""

import dataclasses
import errno
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, get_args

FloatType = Literal["float32", "float16", "bfloat16"]
KvType = FloatType | Literal["q8_0"]
QuantizeType = Literal["q8_0", "q4_0", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"]
Compute = Literal["auto", "exact"]
Engine = Literal["cpu", "tensor", "candle"]


class SourceOptions(TypedDict, total=False):
    """Where to look for a model; `candle_llama.load` explains each option."""

    revision: str | None
    token: str | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    progress: bool


class LoadOptions(SourceOptions, total=False):
    """How to load a model; `candle_llama.load` explains each option."""

    device: str
    dtype: FloatType | Literal["auto"]
    quantize: QuantizeType | None
    compute: Compute
    kv_dtype: KvType | Literal["auto"]
    engine: Engine | Literal["auto"]
    threads: int | None
    context_length: int | None
    max_num_seqs: int | None
    kv_cache_bytes: int | None
    prefix_cache: bool
    strict: bool


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword argument that is also a flag of the command line.

    Attributes:
        default: Its value if it is not given.
        help: Its description on the command line.
        choices: The allowed values, if they can be listed.
        metavar: The name of its value on the command line.
        is_count: Whether it must be a positive integer.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    is_count: bool = False


SOURCE = {
    "revision": Option(None, "branch, tag or commit on the hub", metavar="NAME"),
    "token": Option(None, "access token for the hub (default: the stored login, or HF_TOKEN)"),
    "cache_dir": Option(None, "where downloads are kept", metavar="FOLDER"),
    "local_files_only": Option(False, "use only the cache, not the network"),
    "progress": Option(True, "no progress bars"),
}
"""The options of `SourceOptions`, by name."""

LOADING = {
    "device": Option("auto", "auto, cpu, cuda, cuda:0 or metal (default: auto)"),
    "dtype": Option(
        "auto", "auto keeps the type in which the weights are stored", ("auto", *get_args(FloatType))
    ),
    "quantize": Option(None, "quantise float weights while loading", get_args(QuantizeType)),
    "compute": Option("auto", "exact: float32 activations and KV cache everywhere", get_args(Compute)),
    "kv_dtype": Option(
        "auto",
        "type of the KV cache (default: float16; with --compute exact: float32)",
        ("auto", *get_args(FloatType), "q8_0"),
    ),
    "engine": Option(
        "auto",
        "cpu: our own decoder; tensor: the same in Candle's tensors, on any device; candle: Candle's Llama",
        ("auto", *get_args(Engine)),
    ),
    "threads": Option(None, "default: the performance cores that may be used", metavar="N", is_count=True),
    "context_length": Option(None, "default: the model's own", metavar="N", is_count=True),
    "max_num_seqs": Option(
        None, "most sequences that run together (default: what pays)", metavar="N", is_count=True
    ),
    "kv_cache_bytes": Option(
        None,
        "most memory for keys and values (default: bounded by free memory)",
        metavar="BYTES",
        is_count=True,
    ),
    "prefix_cache": Option(True, "compute equal beginnings of prompts each time"),
    "strict": Option(False, "fail where loading would otherwise only warn"),
}
"""The options that `LoadOptions` adds, by name."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def keywords(*tables: Mapping[str, Option]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorates a function whose last parameter is `**options`, to take the options of `tables`.

    The function receives all of them, defaults included. They are in its signature, so that `help` shows
    them.

    An unknown name raises TypeError with a suggestion. A count that is no positive int raises TypeError or
    ValueError.
    """
    known = {name: option for table in tables for name, option in table.items()}

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = [*(p.name for p in own), *known]

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for name, value in kwargs.items():
                if name not in names:
                    raise TypeError(f"{function.__name__}: unknown option {name!r}{suggestion(name, names)}")
                if name in known and known[name].is_count and value is not None:
                    check_positive(name, value)
                if name in LOADING and isinstance(value, str):
                    check_text(value, name)
                if name in LOADING and isinstance(LOADING[name].default, bool):
                    check_bool(name, value)
            completed: dict[str, Any] = {name: option.default for name, option in known.items()}
            completed.update(kwargs)
            return function(*args, **completed)

        shown = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
            for name, option in known.items()
        ]
        checked.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return checked

    return decorate


def pick(options: Mapping[str, Any], table: Mapping[str, Option]) -> dict[str, Any]:
    """Returns the entries of `options` whose names are in `table`."""
    return {name: options[name] for name in table}


def suggestion(name: str, known: list[str]) -> str:
    """Returns the end of a message about an unknown name: a similar name, or all names."""
    # Imported here because it is slow to import and seldom needed.
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; the parameters are {', '.join(known)}"


def check_positive(name: str, value: Any) -> None:
    """Raises TypeError or ValueError if a value is not an int from 1 to 2**63 - 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int or None, not {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {shown(value)}")
    if value >= 2**63:
        raise ValueError(f"{name} must be less than 2**63, not {shown(value)}")


def check_bool(name: str, value: Any) -> None:
    """Raises TypeError if a value is not a bool, of Python or NumPy."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")


def shown(number: Any) -> str:
    """Formats a number for a message. A very long int, which Python may refuse to format, is shortened."""
    if isinstance(number, int) and abs(number) >= 10**40:
        return f"an int of {number.bit_length()} bits"
    return str(number)


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Replaces "~" or "~name" at the beginning of a path by a home folder.

    Raises:
        FileNotFoundError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise FileNotFoundError(
            errno.ENOENT,
            f'no home folder is known for {user!r}; begin a path with "./" if it is a name',
            path,
        ) from None


def check_path(path: Path, name: str) -> None:
    """Raises ValueError if a path has an unpaired surrogate that is no byte of a file's name."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        check_text(str(path), name)
        raise


def check_text(text: str, name: str) -> None:
    """Raises ValueError if a text has an unpaired surrogate, because UTF-8 cannot express it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start} is {text[error.start]!a}, an unpaired surrogate, which is no "
            "text; it comes from bytes that are not UTF-8, or from one half of a UTF-16 pair"
        ) from None
