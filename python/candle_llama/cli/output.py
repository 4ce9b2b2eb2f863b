"""Input and output of the commands: results go to stdout; notes to stderr, if that is a terminal."""

import contextlib
import dataclasses
import io
import json
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from candle_llama import Chunk, Stats, Stream


def read_stdin() -> str:
    """Reads a text from stdin, without the line end that shells add."""
    return sys.stdin.read().removesuffix("\n")


def write(text: str) -> None:
    """Writes a piece of a result to stdout and flushes it."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A terminal that cannot show a character must not end the answer.
        sys.stdout.reconfigure(errors="replace")
    sys.stdout.write(text)
    sys.stdout.flush()


def fields(record: Any) -> dict[str, Any]:
    """Returns the fields of a frozen record, by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def write_json(value: dict[str, Any]) -> None:
    """Prints one JSON object; infinities and NaN become null."""
    print(json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False))


def write_stream(stream: Stream) -> Iterator[Chunk]:
    """Writes a completion to stdout while it is generated, ends the line, and yields the chunks."""
    begun = False
    try:
        with stream:
            for chunk in stream:
                begun = True
                write(chunk.text)
                yield chunk
    finally:
        # stdout stays empty if there was no chunk, for example because the prompt is too long.
        if begun:
            write("\n")


def write_stats(stats: Stats | None) -> None:
    """Writes a completion's statistics to stderr as one line."""
    if stats is None:
        return
    parts = [f"{stats.prompt_tokens} prompt tokens"]
    if stats.prefill_tokens_per_second is not None:
        parts[-1] += f" at {stats.prefill_tokens_per_second:.1f}/s"
    parts.append(f"{stats.completion_tokens} new tokens")
    if stats.decode_tokens_per_second is not None:
        parts[-1] += f" at {stats.decode_tokens_per_second:.1f}/s"
    if stats.time_to_first_token is not None:
        parts.append(f"first token after {stats.time_to_first_token:.3f} s")
    print(", ".join(parts), file=sys.stderr)


def note(text: str) -> None:
    """Prints a note to stderr, if that is a terminal."""
    if sys.stderr.isatty():
        print(f"candle-llama: {text}", file=sys.stderr)


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[list[str]]:
    """Prints the warnings of the block as notes; yields the list that collects them."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield messages
        finally:
            messages.extend(str(warning.message) for warning in caught if warning.category is UserWarning)
    for message in messages:
        note(f"warning: {message}")


def table(rows: list[tuple[str, str]]) -> str:
    """Returns names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def size(count: int) -> str:
    """Formats a number of bytes in a readable unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = fields(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
