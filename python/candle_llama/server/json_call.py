"""Reads one function call from JSON text, piece by piece."""

import json
from collections.abc import Container

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class NotACallError(Exception):
    """The text is not a call of one of the functions."""


class JsonCall:
    """Reads `{"name": ..., "arguments": {...}}`; `parameters` is another name of `arguments`.

    Arguments are passed on as they are read, once the name is known. Only brackets and strings are followed,
    so that any value takes linear time.

    Attributes:
        name: The function's name, once it is read.
        is_done: The object has ended.
    """

    def __init__(self, names: Container[str]) -> None:
        self.name: str | None = None
        self.is_done = False
        self._names = names
        self._state = "begin"
        self._key = ""
        self._value: list[str] = []
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._has_arguments = False
        self._ready: list[str] = []
        self._held: str | None = None

    @property
    def is_certain(self) -> bool:
        """Whether this is a call: its name is known, and its arguments have begun or are left out."""
        return self.name is not None and (bool(self._ready) or self.is_done)

    def feed(self, text: str) -> int:
        """Reads up to the end of the object, and returns how many characters belong to it.

        Raises:
            NotACallError: It is no JSON object, or calls no known function.
        """
        for index, character in enumerate(text):
            self._read(character)
            if self.is_done:
                return index + 1
        return len(text)

    def take(self) -> str:
        """Returns the arguments that were read since the last call; empty until the name is known."""
        text, self._ready = "".join(self._ready), []
        return text

    def _read(self, character: str) -> None:
        state = self._state
        if state == "value":
            self._in_value(character)
        elif state == "scalar" and character not in ",}" + _SPACE:
            self._value.append(character)
        elif state == "scalar":
            self._end_value()
            self._read(character)
        elif character in _SPACE:
            pass
        elif state == "begin" and character == "{":
            self._state = "first key"
        elif state in ("first key", "key") and character == '"':
            self._begin_value(character)
            self._key = ""
        elif (state == "first key" or state == "comma") and character == "}":
            self._end()
        elif state == "colon" and character == ":":
            self._state = "before value"
        elif state == "before value":
            self._begin_value(character)
        elif state == "comma" and character == ",":
            self._state = "key"
        else:
            raise NotACallError

    def _begin_value(self, character: str) -> None:
        self._value = []
        self._depth = 0
        self._is_key = self._state != "before value"
        self._streams = (
            not self._is_key
            and self._key in _ARGUMENTS
            and not self._has_arguments
            and character == "{"
            and self.name is not None
        )
        self._state = "value" if character in '"{[' else "scalar"
        if self._state == "scalar" and character in ",}]:":
            raise NotACallError
        if self._state == "value":
            self._in_value(character)
        else:
            self._value.append(character)

    def _in_value(self, character: str) -> None:
        (self._ready if self._streams else self._value).append(character)
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if self._depth == 0 and not self._in_string:
            self._end_value()

    def _end_value(self) -> None:
        text = "".join(self._value)
        if self._is_key:
            self._key = _string(text)
            self._state = "colon"
            return
        self._state = "comma"
        if self._key == "name" and self.name is None:
            name = _string(text)
            if name not in self._names:
                raise NotACallError
            self.name = name
            if self._held is not None:
                self._ready.append(self._held)
        elif self._key in _ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            if self._streams:
                return
            # Some models write the arguments as a string that holds JSON.
            arguments = _string(text) if text.startswith('"') else text
            arguments = "{}" if arguments == "null" else arguments
            if not arguments.lstrip().startswith("{"):
                raise NotACallError
            if self.name is None:
                self._held = arguments
            else:
                self._ready.append(arguments)

    def _end(self) -> None:
        if self.name is None:
            raise NotACallError
        if not self._has_arguments:
            self._ready.append("{}")
        self.is_done = True


def _string(text: str) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        raise NotACallError from None
    if not isinstance(value, str):
        raise NotACallError
    return value
