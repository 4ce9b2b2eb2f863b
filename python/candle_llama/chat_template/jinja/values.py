"""What a template computes with: how large a value is, and generators that count what they yield."""

from collections.abc import Iterable, Iterator
from itertools import islice
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2.runtime import LoopContext, Macro, TemplateReference, Undefined
from jinja2.utils import Cycler, Joiner, Namespace

from candle_llama.chat_template.budget import (
    BUDGET,
    MAX_BITS,
    MAX_ITEMS,
    MAX_NESTING,
    Budget,
    ExceededError,
    size,
)

_EMPTY: dict[str, Any] = {}
KEYS: type[Any] = type(_EMPTY.keys())
VIEWS: tuple[type[Any], ...] = (KEYS, type(_EMPTY.values()), type(_EMPTY.items()))
CONTAINERS: tuple[type[Any], ...] = (list, tuple, dict, *VIEWS)
_SEQUENCES: tuple[type[Any], ...] = (list, tuple, *VIEWS)
SIZED: tuple[type[Any], ...] = (str, range, *CONTAINERS)
_METHODS = (BuiltinMethodType, MethodType)
_LEAVES = (Undefined, Macro, range, type, TemplateReference)

# Work of visiting one value: about as long as looking at so many bytes.
VISIT = 256
# What one value that a generator yields may keep in memory.
_YIELDED = 128


class Lazy:
    """A generator whose items count as they come."""

    __slots__ = ("_depth", "_items", "_source")

    def __init__(self, items: Iterator[Any], source: Any) -> None:
        self._depth: int = source._depth + 1 if isinstance(source, Lazy) else 1
        if self._depth > MAX_NESTING:
            raise _too_deep()
        self._items = items
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        budget = BUDGET.get()
        budget.turn()
        budget.memory(_YIELDED)
        return next(self._items)


def _too_deep() -> ExceededError:
    return ExceededError(f"it nests values deeper than {MAX_NESTING} levels")


def attributes(namespace: Namespace) -> dict[str, Any]:
    """The attributes of a namespace, which shows nothing else."""
    return object.__getattribute__(namespace, "_Namespace__attrs")  # type: ignore[no-any-return]


def weigh(value: Any) -> int:
    """Counts a look at a value and all that is in it; returns its bytes, roughly."""
    return _counted(value, False)


def weigh_text(value: Any) -> int:
    """As `weigh`, for a value that will be written as text.

    Raises:
        TypeError: Its text would be an address of memory.
    """
    return _counted(value, True)


def _counted(value: Any, as_text: bool) -> int:
    budget = BUDGET.get()
    if isinstance(value, str):
        length = size(value)
        budget.work(length)
        return length
    return _weigh(value, budget, MAX_NESTING, as_text, frozenset())


def _weigh(value: Any, budget: Budget, levels: int, as_text: bool, within: frozenset[int]) -> int:
    """The size of a value.

    Args:
        value: Any value of a template.
        budget: What is counted down.
        levels: How deep it may be nested.
        as_text: Whether it will be written.
        within: The namespaces around it. They alone may hold themselves.
    """
    if isinstance(value, str):
        return size(value)
    if value is None or isinstance(value, (bool, float)):
        return 24
    if isinstance(value, int):
        return 8 + value.bit_length() // 3
    if isinstance(value, dict):
        parts: Iterable[Any] = (part for item in value.items() for part in item)
        count = 2 * len(value)
    elif isinstance(value, _SEQUENCES):
        parts, count = value, len(value)
    else:
        held = _held(value, as_text)
        if not held:
            return 24
        if isinstance(value, Namespace):
            if id(value) in within:
                return 24
            within |= {id(value)}
        if isinstance(value, Lazy):
            levels -= value._depth
        parts, count = held, len(held)
    if levels <= 0:
        raise _too_deep()
    budget.work(VISIT * (count + 1))
    budget.turn()
    length, strings = 16 + 4 * count, 0
    for part in parts:
        if isinstance(part, str):
            strings += size(part)
        else:
            length += _weigh(part, budget, levels - 1, as_text, within)
    budget.work(strings)
    return length + strings


def _held(value: Any, as_text: bool) -> tuple[Any, ...]:
    """What a value that is no container holds on to."""
    if isinstance(value, Namespace):
        return (attributes(value),)
    if isinstance(value, _LEAVES):
        return ()
    if isinstance(value, LoopContext):
        return () if as_text else (value._iterable,)
    if as_text:
        raise TypeError(f"{_kind(value)} has no text of its own but an address of memory")
    if isinstance(value, Lazy):
        return (value._source,)
    if isinstance(value, Cycler):
        return (value.items,)
    if isinstance(value, Joiner):
        return (value.sep,)
    if isinstance(value, _METHODS):
        return (value.__self__,)
    return ()


def _kind(value: Any) -> str:
    if isinstance(value, Lazy):
        return "a generator"
    if isinstance(value, _METHODS):
        return "a method"
    return f"a {type(value).__name__}"


def sized(value: Any) -> Any:
    """A value whose items will be kept in a list: the items of a generator are, at once.

    Raises:
        ExceededError: It has too many items.
    """
    if isinstance(value, (Lazy, LoopContext)):
        value = list(islice(value, MAX_ITEMS + 1))
    if isinstance(value, SIZED):
        BUDGET.get().items(len(value))
        if isinstance(value, str) and not value.isascii():
            BUDGET.get().memory(64 * len(value))
    return value


def count_made(value: Any) -> Any:
    """Counts what a call has made, and returns it."""
    budget = BUDGET.get()
    if isinstance(value, str):
        budget.string(size(value))
    elif isinstance(value, bool) or value is None:
        pass
    elif isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise ExceededError(f"it makes an integer of more than {MAX_BITS} bits")
    elif isinstance(value, CONTAINERS):
        budget.items(len(value))
    return value


def number(value: Any) -> int:
    """An argument that should be an integer; what else it is, the function that takes it will say."""
    return value if isinstance(value, int) else 0
