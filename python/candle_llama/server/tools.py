"""Finds function calls in the text that a model writes, also while it writes.

Three forms are read. A call is `{"name": ..., "arguments": {...}}`, and "parameters" is another name of
"arguments":

- `<tool_call>CALL</tool_call>`, of Hermes, Qwen and SmolLM2; the latter puts a list of calls into it.
- `<|python_tag|>CALL`, of Llama 3.1 and later.
- CALL, or several with semicolons between them, at the beginning of the answer: Llama 3.2.

Text that may be the beginning of a call is held back until this is certain.
"""

import dataclasses
import secrets
from collections.abc import Container
from typing import TypeAlias

from candle_llama.server.json_call import JsonCall, NotACallError

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"
_PYTHON = "<|python_tag|>"
_MARKS = (_OPEN, _PYTHON)
_BETWEEN = " \t\r\n,;[]"


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer's text."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments, which are JSON."""

    index: int
    text: str


Event: TypeAlias = Text | CallStart | CallArguments


class ToolParser:
    """Divides an answer into text and calls.

    Args:
        names: The functions that may be called; what calls another one is text.
        most: The answer is done after this many calls; None has no limit.
        is_demanded: The answer is a call. If it ends before that is certain, its beginning is dropped.

    Attributes:
        calls: How many calls have begun.
        is_done: All calls that are allowed were read; the rest of the answer is dropped.
    """

    def __init__(self, names: Container[str], most: int | None = None, *, is_demanded: bool = False) -> None:
        self._names = names
        self._most = most
        self._is_demanded = is_demanded
        self.calls = 0
        self.is_done = False
        self._rest = ""
        self._at_begin = True
        self._call: JsonCall | None = None
        # What was read since the mark or the last call, until the next call is certain; None outside calls.
        self._held: str | None = None
        self._in_tag = False
        self._has_calls = False
        self._certain: JsonCall | None = None
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """Reads a piece of the answer."""
        self._rest += text
        self._work(False)
        return self._take()

    def finish(self) -> list[Event]:
        """Reads the end of the answer: what was held back is text, or part of a call."""
        if self._is_demanded and not self.calls and (self._at_begin or self._held is not None):
            self._rest, self._held, self._call = "", None, None
        self._work(True)
        if self._held is not None:
            self._hold(len(self._rest))
        self._leave()
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _work(self, is_end: bool) -> None:
        while self._rest and not self.is_done:
            before = len(self._rest), self._call, self._held, self._at_begin
            if self._call is not None:
                self._read_call(self._call)
            elif self._held is not None:
                self._between()
            elif self._at_begin:
                self._begin(is_end)
            else:
                self._find(is_end)
            if (len(self._rest), self._call, self._held, self._at_begin) == before:
                return

    def _begin(self, is_end: bool) -> None:
        """Looks for a call without a mark, at the beginning of the answer."""
        begin = len(self._rest) - len(self._rest.lstrip())
        if begin == len(self._rest) and not is_end:
            return
        self._at_begin = False
        if self._rest[begin : begin + 1] in ("{", "["):
            self._enter(self._rest[:begin], self._rest[begin:], False)

    def _find(self, is_end: bool) -> None:
        """Passes text on, up to a mark or to what may become one."""
        found = [(at, mark) for mark in _MARKS if (at := self._rest.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            self._text(self._rest[:at])
            self._enter(mark, self._rest[at + len(mark) :], mark == _OPEN)
            return
        keep = 0 if is_end else _overlap(self._rest, _MARKS)
        self._text(self._rest[: len(self._rest) - keep])
        self._rest = self._rest[len(self._rest) - keep :]

    def _enter(self, held: str, rest: str, in_tag: bool) -> None:
        self._held, self._rest, self._in_tag = held, rest, in_tag
        self._has_calls = False

    def _between(self) -> None:
        """Reads what is before, between and after calls."""
        skipped = len(self._rest) - len(self._rest.lstrip(_BETWEEN))
        self._hold(skipped)
        if self._rest.startswith("{"):
            self._call = JsonCall(self._names)
        elif self._in_tag and self._rest.startswith(_CLOSE):
            self._hold(len(_CLOSE))
            self._leave()
        elif self._rest and not (self._in_tag and _CLOSE.startswith(self._rest)):
            self._leave()

    def _hold(self, count: int) -> None:
        self._held = (self._held or "") + self._rest[:count]
        self._rest = self._rest[count:]

    def _leave(self) -> None:
        """Goes back to text. What was held is text, unless it is what stands around calls."""
        if self._held and (self._call is not None or not self._has_calls):
            self._text(self._held)
        self._held = self._call = None

    def _read_call(self, call: JsonCall) -> None:
        try:
            count = call.feed(self._rest)
        except NotACallError:
            self._not_a_call()
            return
        is_new = self._certain is not call
        if is_new and not call.is_certain:
            self._hold(count)
            return
        self._rest = self._rest[count:]
        if is_new and call.name is not None:
            self._events.append(CallStart(self.calls, "call_" + secrets.token_hex(12), call.name))
            self.calls += 1
            self._has_calls = True
            self._held = ""
            self._certain = call
        if arguments := call.take():
            self._events.append(CallArguments(self.calls - 1, arguments))
        if call.is_done:
            self._call = None
            self.is_done = self._most is not None and self.calls >= self._most

    def _not_a_call(self) -> None:
        """Gives back what was held as text, up to a mark inside it."""
        held, self._held, self._call = self._held or "", None, None
        # Behind its first character, for its mark must not be found again.
        self._text(held[:1])
        self._rest = held[1:] + self._rest

    def _text(self, text: str) -> None:
        if text:
            self._events.append(Text(text))


def _overlap(text: str, marks: tuple[str, ...]) -> int:
    """Returns the length of the longest end of `text` with which a mark begins."""
    longest = max(map(len, marks)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
