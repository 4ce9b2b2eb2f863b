"""The methods and attributes that a template may use, and what each call of one counts.

A rule has the parameters of the method it is for, and is called before it. What has no rule is refused.
"""

import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Cycler, Joiner
from markupsafe import Markup

from candle_llama.chat_template.budget import BUDGET, MAX_ITEMS, ExceededError, size
from candle_llama.chat_template.jinja.operators import ESCAPED, check_key, check_search
from candle_llama.chat_template.jinja.values import number, weigh, weigh_text

Rule = Callable[..., None]

# Work for a character of a format.
_PARSED = 100
# Widest field of `str.format`.
_MAX_WIDTH = 10_000
_DIGITS = re.compile("[0-9]+")
# What a part of a string takes in memory.
_PART = 64
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def linear(work: int) -> Rule:
    """The rule for a method that looks at each character, for `work`, and makes at most as many."""

    def rule(text: str, *args: Any, **kwargs: Any) -> None:
        budget = BUDGET.get()
        budget.work(work * size(text))
        for value in (*args, *kwargs.values()):
            weigh(value)

    return rule


def _reverse_search(text: str, part: str = "", *args: Any, **kwargs: Any) -> None:
    # Python looks from the end for each character of `part` at each place.
    BUDGET.get().work(len(text) * (1 + len(part) // 2) if isinstance(part, str) else 0)


def strip(text: str, characters: str | None = None) -> None:
    """The rule for `strip`, which looks for each character in `characters`."""
    BUDGET.get().work(len(text) * (1 + len(characters)) if isinstance(characters, str) else len(text))


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> None:
    budget = BUDGET.get()
    budget.memory(size(text))
    has_separator = isinstance(sep, str) and sep
    parts = text.count(sep) if has_separator else len(text.split(None, MAX_ITEMS))  # type: ignore[arg-type]
    if isinstance(maxsplit, int) and maxsplit >= 0:
        parts = min(parts, maxsplit)
    budget.items(parts + 1)
    budget.memory(_PART * (parts + 1))


def _split_from_end(text: str, sep: str | None = None, maxsplit: int = -1) -> None:
    _reverse_search(text, sep or "")
    _split(text, sep, maxsplit)


def _split_lines(text: str, keepends: bool = False) -> None:
    budget = BUDGET.get()
    budget.memory(size(text))
    lines = count_lines(text)
    budget.items(lines)
    budget.memory(_PART * lines)


def count_lines(text: str) -> int:
    """How many lines a string has, at most."""
    BUDGET.get().work(size(text))
    ends = _LINE_ENDS[:7] if text.isascii() else _LINE_ENDS
    return 1 + sum(text.count(end) for end in ends)


def pad(text: str, width: int = 0, fill: str = " ") -> None:
    """The rule for methods that pad a string to `width` characters."""
    bytes_each = 1 if text.isascii() and isinstance(fill, str) and fill.isascii() else 4
    BUDGET.get().string(size(text) + bytes_each * max(number(width), 0))


def _expand_tabs(text: str, tabsize: int = 8) -> None:
    bytes_each = 1 if text.isascii() else 4
    BUDGET.get().string(size(text) + bytes_each * text.count("\t") * max(number(tabsize), 0))


def replace(text: str, old: str = "", new: str = "", count: int = -1) -> None:
    """The rule for `replace`."""
    if not isinstance(old, str) or not isinstance(new, str):
        return
    budget = BUDGET.get()
    budget.work(2 * size(text))
    places = text.count(old) if old else len(text) + 1
    if number(count) >= 0 and not isinstance(count, bool):
        places = min(places, count)
    if isinstance(text, Markup):
        length = ESCAPED * size(new)
    else:
        length = size(new) if text.isascii() == new.isascii() else 4 * len(new)
    budget.string((size(text) if text.isascii() >= new.isascii() else 4 * len(text)) + places * length)
    budget.work(8 * places)


def join(text: str, items: Iterable[Any]) -> None:
    """The rule for `join`; the items are a list already."""
    length = weigh(items) + size(text) * len(items)  # type: ignore[arg-type]
    BUDGET.get().string(length * (ESCAPED if isinstance(text, Markup) else 1))


def unescape(text: str) -> None:
    """The rule for replacing entities of HTML, which Python does for each of them."""
    BUDGET.get().work(1000 * text.count("&") + 8 * size(text))


def strip_tags(text: str) -> None:
    """The rule for removing tags: for each, the text is copied."""
    budget = BUDGET.get()
    budget.work((16 + text.count("<")) * size(text))
    budget.memory(_PART // 2 * size(text))
    unescape(text)


def _get(mapping: Mapping[Any, Any], key: Any = None, default: Any = None) -> None:
    check_key(key)


def _copy(items: Any) -> None:
    BUDGET.get().items(len(items))


def _search(items: Any, item: Any = None, *args: Any) -> None:
    check_search(items, item)


def _changed(loop: LoopContext, *value: Any) -> None:
    weigh(value)


def _free(*args: Any) -> None:
    """The rule for what takes no longer for a larger value."""


_STRING: dict[str, Rule] = {
    **dict.fromkeys(("casefold", "capitalize", "lower", "swapcase", "title", "upper"), linear(8)),
    **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier"), linear(8)),
    **dict.fromkeys(("islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper"), linear(8)),
    **dict.fromkeys(("count", "endswith", "find", "index", "partition", "startswith"), linear(2)),
    **dict.fromkeys(("removeprefix", "removesuffix"), linear(2)),
    **dict.fromkeys(("rfind", "rindex", "rpartition"), _reverse_search),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), strip),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), pad),
    "expandtabs": _expand_tabs,
    "format": _free,
    "format_map": _free,
    "join": join,
    "replace": replace,
    "rsplit": _split_from_end,
    "split": _split,
    "splitlines": _split_lines,
}
_SEARCHES: dict[str, Rule] = {"count": _search, "index": _search}
_REAL: dict[str, Rule] = {"as_integer_ratio": _free, "conjugate": _free, "is_integer": _free}
METHODS: dict[type, dict[str, Rule]] = {
    str: _STRING,
    Markup: {**_STRING, "striptags": strip_tags, "unescape": unescape},
    list: {**_SEARCHES, "copy": _copy},
    tuple: _SEARCHES,
    range: _SEARCHES,
    dict: {"copy": _copy, "get": _get, "items": _free, "keys": _free, "values": _free},
    bool: _REAL,
    int: {**_REAL, "bit_count": _free, "bit_length": _free},
    float: {**_REAL, "hex": _free},
    LoopContext: {"changed": _changed, "cycle": _free},
    Cycler: {"next": _free, "reset": _free},
}
_PARTS = ("real", "imag", "numerator", "denominator")
ATTRIBUTES: dict[type, frozenset[str]] = {
    range: frozenset(("start", "stop", "step")),
    bool: frozenset(_PARTS),
    int: frozenset(_PARTS),
    float: frozenset(_PARTS[:2]),
    LoopContext: frozenset(
        (
            *("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"),
            *("previtem", "nextitem"),
        )
    ),
    Macro: frozenset(("name", "arguments", "catch_kwargs", "catch_varargs", "caller", "explicit_caller")),
    Cycler: frozenset(("items", "pos", "current")),
    Joiner: frozenset(("sep", "used")),
    BlockReference: frozenset(("name", "super")),
}
"""The attributes, by type, that may be read beside the methods."""


class _Bounded(string.Formatter):
    """Counts each field of `str.format` before it is written."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if len(format_spec) > _MAX_WIDTH:
            raise ExceededError(f"the format of a field is longer than {_MAX_WIDTH} characters")
        widths = [digits.lstrip("0") for digits in _DIGITS.findall(format_spec)]
        if any(len(digits) > 5 or int(digits or 0) > _MAX_WIDTH for digits in widths):
            raise ExceededError(f"a field is wider than {_MAX_WIDTH} characters")
        self._count(value, len(format_spec) + sum(int(digits or 0) for digits in widths))
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._count(value, 0)
        return super().convert_field(value, conversion)

    def _count(self, value: Any, more: int) -> None:
        budget = BUDGET.get()
        budget.turn()
        budget.string(weigh_text(value) + more)


class _Formatter(_Bounded, SandboxedFormatter):
    pass


class _EscapeFormatter(_Bounded, SandboxedEscapeFormatter):
    pass


def format_string(environment: Any, text: str, name: str, args: Any, kwargs: Any) -> str:
    """`text.format(*args, **kwargs)`, or `format_map`, with the attributes that the sandbox allows."""
    if name == "format_map":
        if kwargs:
            raise TypeError("format_map() takes no keyword arguments")
        if len(args) != 1:
            raise TypeError(f"format_map() takes exactly one argument ({len(args)} given)")
        args, kwargs = (), args[0]
    BUDGET.get().work(_PARSED * size(text))
    if isinstance(text, Markup):
        return Markup(_EscapeFormatter(environment, escape=text.escape).vformat(text, args, kwargs))
    return _Formatter(environment).vformat(text, args, kwargs)
