"""Operators. Each checks what it is about to make, or to compare, and is then Python's own."""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2.runtime import LoopContext, Undefined, markup_join, str_join
from markupsafe import Markup

from candle_llama.chat_template.budget import BUDGET, MAX_BITS, ExceededError, size
from candle_llama.chat_template.jinja.values import CONTAINERS, KEYS, Lazy, count_made, weigh, weigh_text

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}
_NUMBERS = (int, float)
_SEQUENCES = (str, list, tuple)
# What may be a width or a precision of printf; `*` takes one from the arguments.
_WIDTH = re.compile(r"\*|([0-9]++)[.hlLdiouxXeEfFgGcrsa%]?")
# Work for a character of a format.
_PARSED = 300
# The longest that a number is without a width.
_NUMBER = 350
# What escaping makes of one character.
ESCAPED = 5


def binary(symbol: str, left: Any, right: Any) -> Any:
    """Computes `left` `symbol` `right`."""
    budget = BUDGET.get()
    budget.turn()
    compute = _BINARY[symbol]
    if isinstance(left, _NUMBERS) and isinstance(right, _NUMBERS):
        if isinstance(left, int) and isinstance(right, int):
            _check_integer(symbol, left, right)
        result = compute(left, right)
        if isinstance(result, complex):
            raise TypeError("complex numbers are not supported")
        return count_made(result)
    if symbol == "+" and isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES):
        if isinstance(left, str) and isinstance(right, str):
            longer = ESCAPED if isinstance(left, Markup) or isinstance(right, Markup) else 1
            budget.string(longer * (size(left) + size(right)))
        else:
            budget.items(len(left) + len(right))
        return compute(left, right)
    if symbol == "*" and isinstance(left, _SEQUENCES) and isinstance(right, int):
        return _repeated(left, right)
    if symbol == "*" and isinstance(right, _SEQUENCES) and isinstance(left, int):
        return _repeated(right, left)
    if symbol == "%" and isinstance(left, str):
        check_printf(left, right)
        return count_made(left % right)
    if isinstance(left, Undefined) or isinstance(right, Undefined):
        return compute(left, right)
    kinds = f"{type(left).__name__!r} and {type(right).__name__!r}"
    raise TypeError(f"unsupported operand type(s) for {symbol}: {kinds}")


def unary(symbol: str, value: Any) -> Any:
    """Computes `symbol` `value`."""
    BUDGET.get().turn()
    return operator.neg(value) if symbol == "-" else operator.pos(value)


def _check_integer(symbol: str, left: int, right: int) -> None:
    if symbol == "*":
        bits = left.bit_length() + right.bit_length()
    elif symbol == "**" and right > 0:
        bits = left.bit_length() * right if left not in (-1, 0, 1) else 1
    else:
        return
    if bits > MAX_BITS + 64:
        raise ExceededError(f"it makes an integer of more than {MAX_BITS} bits")


def _repeated(value: Any, times: int) -> Any:
    times = max(times, 0)
    if isinstance(value, str):
        BUDGET.get().string(size(value) * times)
    else:
        BUDGET.get().items(len(value) * times)
    return value * times


def check_printf(text: str, values: Any) -> None:
    """Counts what `text % values` will make."""
    budget = BUDGET.get()
    length = size(text) + _NUMBER * (fields := text.count("%"))
    budget.work(_PARSED * size(text))
    given = values if isinstance(values, tuple) else (values,)
    largest = max((abs(value) for value in given if isinstance(value, int)), default=0)
    for found in _WIDTH.finditer(text):
        width = found[1]
        if width is None:
            length += largest
        elif len(width) < len(found[0]):
            length += int(width.lstrip("0")[:10] or 0)
    # A mapping's values may be written more than once.
    written = weigh_text(values) * (fields if not isinstance(values, tuple) else 1)
    budget.string(length + written * (ESCAPED if isinstance(text, Markup) else 1))


def compare(name: str, left: Any, right: Any) -> Any:
    """Compares two values by the operator that Jinja calls `name`."""
    budget = BUDGET.get()
    budget.turn()
    if name == "in":
        return contains(right, left)
    if name == "notin":
        return not contains(right, left)
    if isinstance(left, str):
        if isinstance(right, str):
            budget.work(min(len(left), len(right)))
    elif isinstance(left, CONTAINERS) and isinstance(right, CONTAINERS):
        _weigh_pair(name, left, right)
    return _COMPARISONS[name](left, right)


def _weigh_pair(name: str, left: Any, right: Any) -> None:
    if name in ("eq", "ne") and len(left) != len(right):
        return
    weigh(left)
    weigh(right)


def compare_chain(left: Any, rest: Iterable[tuple[str, Callable[[], Any]]]) -> Any:
    """Compares `a < b < c`: stops at the first comparison that does not hold."""
    result = True
    for name, get in rest:
        right = get()
        result = compare(name, left, right)
        if not result:
            break
        left = right
    return result


def contains(container: Any, item: Any) -> bool:
    """Tells whether `item` is in `container`."""
    budget = BUDGET.get()
    if isinstance(container, str):
        if isinstance(item, str):
            budget.work(len(container) + len(item))
    elif isinstance(container, (dict, KEYS)):
        check_key(item)
    elif isinstance(container, (range, *CONTAINERS)):
        check_search(container, item)
    elif isinstance(container, (Lazy, LoopContext)):
        return any(other is item or compare("eq", other, item) for other in container)
    return item in container


def look(text: str) -> None:
    """Counts a look at one character of a string, or at its length."""
    if len(text) > 10_000:
        BUDGET.get().work(len(text) >> 6)


def check_search(container: Any, item: Any) -> None:
    """Counts a comparison of `item` with each item of `container`."""
    budget = BUDGET.get()
    if isinstance(item, str):
        budget.work(len(container) * (32 + size(item)))
    elif isinstance(item, CONTAINERS):
        weight = weigh(item)
        if not isinstance(container, range):
            weigh(container)
        budget.work(len(container) * (32 + weight))
    else:
        budget.work(32 * len(container))


def check_key(key: Any) -> None:
    """Counts a look at a key that is about to be hashed and compared."""
    if isinstance(key, str):
        if len(key) > 100:
            BUDGET.get().work(len(key))
    elif isinstance(key, tuple):
        weigh(key)


def concatenate(is_escaping: bool, values: Sequence[Any]) -> str:
    """Computes `a ~ b ~ c`."""
    budget = BUDGET.get()
    budget.turn()
    length = 0
    for value in values:
        length += size(value) if isinstance(value, str) else weigh_text(value)
    budget.string(length * (ESCAPED if is_escaping else 1))
    return markup_join(values) if is_escaping else str_join(values)


def get_slice(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """Computes `value[start:stop:step]`."""
    budget = BUDGET.get()
    budget.turn()
    if isinstance(value, str):
        budget.memory(size(value))
    elif isinstance(value, (list, tuple)):
        budget.items(len(value))
    return value[start:stop:step]
