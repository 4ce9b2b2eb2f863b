"""What one rendering may use.

A template comes with a model, so whatever it does must end soon and in little memory.
"""

import sys
import time
from contextvars import ContextVar

MAX_BYTES = 32 << 20
"""Longest string, and longest prompt, in bytes of memory."""
MAX_ITEMS = 1_000_000
"""Longest list."""
MAX_NESTING = 150
"""Deepest nesting of values, and of calls."""
MAX_BITS = 14_000
"""Largest integer. Python writes integers of up to 4300 digits."""

_MAX_MEMORY = 512 << 20
_MAX_WORK = 1 << 30
_SECONDS = 2.0

# The clock is read at every 64th turn, and before work that takes more than some microseconds.
_TURNS = 64
_MUCH_WORK = 1 << 16
# Memory of one item of a list.
_ITEM = 32
# What a string takes beside its characters; in "é", they and what ends them have one byte each.
_HEADER = sys.getsizeof("é") - 2


class ExceededError(Exception):
    """The template makes, or does, more than any prompt needs."""


class Budget:
    """Counts what a rendering uses, on the thread that renders."""

    __slots__ = ("_end", "_memory", "_turns", "_work", "depth")

    def __init__(self) -> None:
        self._end = time.thread_time() + _SECONDS
        self._memory = 0
        self._work = 0
        self._turns = _TURNS
        self.depth = 0
        """How many calls are within one another."""

    def turn(self) -> None:
        """Counts one turn of a loop, or one step that takes about as long."""
        self._turns -= 1
        if not self._turns:
            self._look_at_the_clock()

    def work(self, amount: int) -> None:
        """Counts work before it is done: an `amount` of 1 takes about a nanosecond."""
        self._work += amount
        if self._work > _MAX_WORK:
            raise ExceededError("it does more work than any prompt needs")
        if amount > _MUCH_WORK:
            self._look_at_the_clock()

    def memory(self, amount: int) -> None:
        """Counts bytes of memory before they are used; they stay counted when they are freed."""
        self._memory += amount
        if self._memory > _MAX_MEMORY:
            raise ExceededError(f"it makes strings and lists of more than {_MAX_MEMORY >> 20} MiB in all")
        if amount > _MUCH_WORK:
            self.work(amount)

    def room(self, length: int) -> None:
        """Refuses a string of `length` bytes that is about to be made, if it is too long."""
        if length > MAX_BYTES:
            raise ExceededError(f"it makes a string of {length} bytes, the limit is {MAX_BYTES}")

    def string(self, length: int) -> None:
        """Counts a string of `length` bytes that is about to be made."""
        self.room(length)
        self.memory(length)

    def items(self, count: int) -> None:
        """Counts a list of `count` items that is about to be made."""
        if count > MAX_ITEMS:
            raise ExceededError(f"it makes a list of {count} items, the limit is {MAX_ITEMS}")
        self.memory(_ITEM * count)

    def _look_at_the_clock(self) -> None:
        self._turns = _TURNS
        if time.thread_time() > self._end:
            raise ExceededError(f"it runs for more than {_SECONDS:g} seconds")


BUDGET: ContextVar[Budget] = ContextVar("candle_llama.chat_template.BUDGET")
"""The budget of the rendering that runs."""


def size(text: str) -> int:
    """Bytes of memory of a string's characters."""
    return len(text) if text.isascii() else sys.getsizeof(text) - _HEADER
