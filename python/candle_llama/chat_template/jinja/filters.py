"""Jinja's filters and tests, each with what it may make.

A rule has the parameters of the filter it is for, is called before it, and returns the value that the filter
is given: a generator whose items the filter keeps becomes a list first. A filter without a rule is left out.
"""

import json
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import jinja2
import jinja2.filters
import jinja2.tests
from jinja2.filters import make_attrgetter
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import pass_environment

from candle_llama.chat_template.budget import BUDGET, ExceededError, size
from candle_llama.chat_template.jinja import methods, operators
from candle_llama.chat_template.jinja.operators import ESCAPED
from candle_llama.chat_template.jinja.values import (
    CONTAINERS,
    SIZED,
    Lazy,
    count_made,
    number,
    sized,
    weigh,
    weigh_text,
)

Rule = Callable[..., Any]

_FILTERS: dict[str, Callable[..., Any]] = jinja2.filters.FILTERS
_TESTS: dict[str, Any] = jinja2.tests.TESTS

# Work for an item that a filter goes through in Python, and for a character that a regular expression does.
_ITEM = 2000
_MATCHED = 256
# Python reads integers of up to 4300 digits.
_MAX_DIGITS = 4300
# Most decimals of a rounded number.
_MAX_DECIMALS = 400
# Characters that JSON writes as six.
_CONTROL = re.compile("[\x00-\x07\x0b\x0e-\x1f]")


def _free(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _text(work: int, memory: int = 0) -> Rule:
    """The rule for a filter of text that takes `work` and `memory` for each byte."""

    def rule(value: Any, *args: Any, **kwargs: Any) -> Any:
        length = weigh_text(value) + weigh(args) + weigh(kwargs)
        budget = BUDGET.get()
        budget.work(work * length)
        budget.memory(memory * length)
        budget.room(length)
        return value

    return rule


def _items(value: Any, *args: Any, **kwargs: Any) -> Any:
    return sized(value)


def _sorted(value: Any, *args: Any, **kwargs: Any) -> Any:
    value = sized(value)
    if isinstance(value, SIZED):
        budget = BUDGET.get()
        weight = weigh(value)
        budget.work((weight + 64 * len(value)) * len(value).bit_length() + _ITEM * len(value))
        budget.memory(weight)
    return value


def _length(value: Any) -> Any:
    if isinstance(value, str):
        operators.look(value)
    return value


def _escape(value: Any) -> Any:
    length = weigh_text(value)
    if isinstance(value, str):
        length += (ESCAPED - 1) * sum(value.count(character) for character in "<>&'\"")
    else:
        length *= ESCAPED
    BUDGET.get().string(length)
    return value


def _number(value: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise ExceededError(f"it reads a number of {len(value)} characters, the limit is {_MAX_DIGITS}")
    return value


def _round(value: Any, precision: Any = 0, *args: Any, **kwargs: Any) -> Any:
    if abs(number(precision)) > _MAX_DECIMALS:
        raise ExceededError(f"it rounds to {precision} decimals, the limit is {_MAX_DECIMALS}")
    return value


def _center(value: Any, width: Any = 80) -> Any:
    weigh_text(value)
    methods.pad(str(value), width)
    return value


def _indent(value: Any, width: Any = 4, *args: Any, **kwargs: Any) -> Any:
    if isinstance(value, str):
        each = size(width) if isinstance(width, str) else number(width)
        bytes_each = 1 if value.isascii() else 4
        budget = BUDGET.get()
        budget.memory(size(value))
        lines = methods.count_lines(value)
        budget.items(lines)
        budget.string(size(value) + bytes_each * (lines + 1) * max(each, 1))
    return value


def _join(value: Any, d: Any = "", attribute: Any = None) -> Any:
    value = sized(value)
    if isinstance(value, SIZED):
        length = weigh_text(value) + weigh_text(d) * len(value)
        budget = BUDGET.get()
        budget.work(_ITEM // 4 * len(value))
        budget.string(length)
    return value


def _replace(value: Any, old: Any, new: Any, count: Any = None) -> Any:
    for part in (value, old, new):
        weigh_text(part)
    methods.replace(str(value), str(old), str(new), -1 if count is None else count)
    return value


def _trim(value: Any, chars: Any = None) -> Any:
    weigh_text(value)
    methods.strip(str(value), chars)
    return value


def _reverse(value: Any) -> Any:
    if isinstance(value, str):
        BUDGET.get().string(size(value))
    return value


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    weigh_text(value)
    operators.check_printf(str(value), kwargs or args)
    return value


def _batch(value: Any, linecount: Any, fill_with: Any = None) -> Any:
    weigh(value)
    if fill_with is not None:
        BUDGET.get().items(number(linecount))
    return value


def _slice(value: Any, slices: Any, fill_with: Any = None) -> Any:
    weigh(value)
    return sized(value) if isinstance(value, str) else value


def _wrap(
    value: Any,
    width: Any = 79,
    break_long_words: Any = True,
    wrapstring: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if isinstance(value, str):
        budget = BUDGET.get()
        length = size(value)
        budget.work(_MATCHED * length + length * length // max(number(width), 1))
        budget.memory(64 * length)
        budget.room(length * (size(wrapstring) if isinstance(wrapstring, str) else 1))
    return value


def _urlize(value: Any, *args: Any, **kwargs: Any) -> Any:
    length = weigh_text(value)
    budget = BUDGET.get()
    budget.work(_ITEM * length + length * length // 8)
    budget.room(sum(map(weigh_text, (*args, *kwargs.values()))) * (length + 1) + 100 * length)
    return value


def _query(value: Any) -> Any:
    if not isinstance(value, str):
        value = sized(value)
    length = weigh_text(value)
    budget = BUDGET.get()
    budget.work(64 * length)
    budget.memory(16 * length)
    if isinstance(value, CONTAINERS):
        budget.work(_ITEM * len(value))
    return value


def _attributes(value: Any, *args: Any, **kwargs: Any) -> Any:
    budget = BUDGET.get()
    budget.string(ESCAPED * weigh_text(value))
    if isinstance(value, dict):
        budget.work(_ITEM * len(value))
    return value


def _strip_tags(value: Any) -> Any:
    weigh_text(value)
    methods.strip_tags(str(value))
    return value


def _pretty(value: Any) -> Any:
    # A line may begin with as many spaces as the keys around it are long, and a word may be a line.
    length, keys = weigh_text(value), _longest_keys(value)
    budget = BUDGET.get()
    budget.work(100 * length)
    budget.string(length + length // 4 * (keys + 100))
    return value


def _longest_keys(value: Any) -> int:
    """The most that keys within one another are long."""
    if isinstance(value, dict):
        return max((4 + weigh_text(key) + _longest_keys(item) for key, item in value.items()), default=0)
    if isinstance(value, (list, tuple)):
        return 1 + max(map(_longest_keys, value), default=0)
    return 1


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers writes JSON: not for HTML, and with the arguments of `json.dumps`."""
    budget = BUDGET.get()
    budget.turn()
    if separators is not None:
        separators = tuple(sized(separators))
    length, count, depth = _json_size(value, bool(ensure_ascii), 0)
    between = 4 if separators is None else weigh_text(separators)
    if indent is not None:
        between += 1 + depth * (size(indent) if isinstance(indent, str) else max(number(indent), 0))
    budget.work(_ITEM * count if indent is not None or sort_keys else 100 * count)
    budget.string(length + 2 * (count + 1) * between)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _json_size(value: Any, is_ascii: bool, depth: int) -> tuple[int, int, int]:
    """How long a value is as JSON, without separators; how many items it has, and its depth."""
    if depth == 0:
        weigh(value)
    if isinstance(value, str):
        length = size(value)
        if is_ascii and not value.isascii():
            return 12 * length, 1, depth
        return (6 if _CONTROL.search(value) else 2) * length, 1, depth
    if isinstance(value, dict):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        return (_MAX_DIGITS if isinstance(value, int) and value.bit_length() > 64 else 24), 1, depth
    length, count, deepest = 2, 1, depth
    for part in parts:
        more, items, levels = _json_size(part, is_ascii, depth + 1)
        length, count, deepest = length + more, count + items, max(deepest, levels)
    return length, count, deepest


@pass_environment
def _sum(environment: SandboxedEnvironment, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    items = sized(value)
    if attribute is not None:
        items = list(map(make_attrgetter(environment, attribute), items))
    numbers = (int, float)
    items = list(items)
    if isinstance(start, numbers) and all(isinstance(item, numbers) for item in items):
        BUDGET.get().work(100 * len(items))
        return count_made(sum(items, start))
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings [use ''.join(seq) instead]")
    for item in items:
        start = operators.binary("+", start, item)
    return start


@pass_environment
def _attribute(environment: SandboxedEnvironment, value: Any, name: Any) -> Any:
    """As `value.name`, without looking for an item of that name."""
    if not isinstance(name, str):
        return environment.undefined(name=str(weigh_text(name) and name))
    return environment.get_attribute(value, name)  # type: ignore[attr-defined]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("abs", "d", "default", "first", "last", "random", "items"), _free),
    **dict.fromkeys(("map", "reject", "rejectattr", "select", "selectattr"), _free),
    **dict.fromkeys(("capitalize", "lower", "safe", "string", "truncate", "upper"), _text(8)),
    **dict.fromkeys(("count", "length"), _length),
    **dict.fromkeys(("e", "escape", "forceescape"), _escape),
    **dict.fromkeys(("filesizeformat", "float", "int"), _number),
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), _sorted),
    "batch": _batch,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "list": _items,
    "pprint": _pretty,
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "slice": _slice,
    "striptags": _strip_tags,
    "title": _text(_MATCHED, 64),
    "trim": _trim,
    "urlencode": _query,
    "urlize": _urlize,
    "wordcount": _text(64, 32),
    "wordwrap": _wrap,
    "xmlattr": _attributes,
}
_LAZY = frozenset(
    ("batch", "items", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "unique")
)


def _bounded(name: str, rule: Rule) -> Callable[..., Any]:
    """Jinja's filter with its rule."""
    function = _FILTERS[name]
    # What the environment passes before the value.
    before = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        BUDGET.get().turn()
        source = args[before]
        value = rule(*args[before:], **kwargs)
        result = function(*args[:before], value, *args[before + 1 :], **kwargs)
        if name in _LAZY and not isinstance(result, (str, list)):
            return Lazy(iter(result), source)
        return result if rule is _free else count_made(result)

    return bounded


def filters() -> dict[str, Callable[..., Any]]:
    """The filters of chat templates."""
    return {
        **{name: _bounded(name, rule) for name, rule in RULES.items()},
        "attr": _attribute,
        "sum": _sum,
        "tojson": _to_json,
    }


def tests() -> dict[str, Callable[..., Any]]:
    """The tests of chat templates."""
    kept = ["boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable", "mapping"]
    kept += ["none", "number", "sameas", "sequence", "string", "true", "undefined"]
    comparisons = {"==": "eq", "eq": "eq", "equalto": "eq", "!=": "ne", "ne": "ne", "in": "in"}
    comparisons |= {"<": "lt", "lt": "lt", "lessthan": "lt", "<=": "lteq", "le": "lteq"}
    comparisons |= {">": "gt", "gt": "gt", "greaterthan": "gt", ">=": "gteq", "ge": "gteq"}
    return {
        **{name: _counted(_TESTS[name]) for name in kept},
        **{name: _comparison(operator) for name, operator in comparisons.items()},
        "divisibleby": lambda value, num: operators.binary("%", value, num) == 0,
        "even": lambda value: operators.binary("%", value, 2) == 0,
        "odd": lambda value: operators.binary("%", value, 2) == 1,
        "filter": _named(_TESTS["filter"]),
        "test": _named(_TESTS["test"]),
        "lower": lambda value: _checked_text(value).islower(),
        "upper": lambda value: _checked_text(value).isupper(),
    }


def _checked_text(value: Any) -> str:
    BUDGET.get().work(8 * weigh_text(value))
    return str(value)


def _counted(test: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(test)
    def counted(*args: Any, **kwargs: Any) -> Any:
        BUDGET.get().turn()
        return test(*args, **kwargs)

    return counted


def _comparison(name: str) -> Callable[..., Any]:
    def compare(value: Any, other: Any) -> Any:
        return operators.compare(name, value, other)

    return compare


def _named(test: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(test)
    def named(environment: Any, value: Any) -> Any:
        operators.check_key(value)
        return test(environment, value)

    return named
