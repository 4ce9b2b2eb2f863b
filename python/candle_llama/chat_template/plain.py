"""What the caller gave, as the plain data that a template may see."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

# How deep messages, tools and variables may be nested; ends what contains itself.
_MAX_DEPTH = 64
# How many values they may have in all; ends what has no end. 10,000 messages have about 50,000, and these
# are few enough to be refused within a second on a slow machine.
_MAX_VALUES = 200_000
_MAX_BITS = 14_000


def plain(value: Any) -> Any:
    """A copy of dicts, lists, tuples, strings, numbers, booleans and None, and of nothing else.

    Mappings become dicts and sequences lists; subclasses of Python's own types become those.

    Raises:
        TypeError: It holds something else.
        ValueError: It is nested too deep, too large, or a number that JSON does not have.
    """
    return _Copier().copy(value, _MAX_DEPTH + 1)


class _Copier:
    def __init__(self) -> None:
        self._left = _MAX_VALUES

    def copy(self, value: Any, depth: int) -> Any:
        if depth == 0:
            raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"messages, tools and variables have more than {_MAX_VALUES} values")
        if value is None or value is True or value is False:
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            if value.bit_length() > _MAX_BITS:
                raise ValueError("an integer is too large")
            return int.__int__(value)
        if isinstance(value, float):
            if not isfinite(value):
                raise ValueError("a number is not finite")
            return float.__float__(value)
        depth -= 1
        if isinstance(value, tuple):
            return tuple([self.copy(item, depth) for item in value])
        # Lists first: to ask whether something belongs to an abstract class takes long.
        if not isinstance(value, list):
            if isinstance(value, Mapping):
                return {_key(key): self.copy(item, depth) for key, item in value.items()}
            if not isinstance(value, Sequence):
                raise TypeError(
                    "dicts, lists, strings, numbers, booleans and None can be passed, "
                    f"not {type(value).__name__}"
                )
        return [self.copy(item, depth) for item in value]


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"keys are strings, not {type(key).__name__}")
    return str.__str__(key)


def with_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their reasoning under each name that templates read.

    These are `reasoning_content`, and `thinking` where the message has no such key, as in transformers. The
    caller may have it under `reasoning`, too.
    """
    return [_with_reasoning(message) for message in messages]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    for name in ("reasoning_content", "thinking", "reasoning"):
        if message.get(name) is not None:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message
