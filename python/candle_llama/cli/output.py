"""Input and output of the commands: results go to stdout; notes to stderr, most only on a terminal."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from candle_llama import Chunk, Stats, Stream

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def read_stdin() -> str:
    """Reads a text from stdin, without the line end that shells add.

    Raises:
        ValueError: It is not UTF-8.
    """
    return decode(_stdin().read(), "stdin").removesuffix("\n")


def stdin_is_terminal() -> bool:
    """Returns whether somebody can type; stdin may also be closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_file(path: str) -> str:
    """Reads a text from a file, without its last line end.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8.
    """
    return decode(Path(path).read_bytes(), path).removesuffix("\n")


def stdin_lines() -> Iterator[str]:
    """Reads stdin line by line.

    Raises:
        ValueError: A line is not UTF-8.
    """
    for number, line in enumerate(_stdin(), 1):
        yield decode(line, f"stdin, line {number}")


def _stdin() -> BinaryIO:
    """Returns stdin as bytes, because its encoding follows the locale.

    What a notebook or a test puts in its place may have text only. A closed stdin is empty.
    """
    if sys.stdin is None:
        return io.BytesIO()
    buffer: BinaryIO | None = getattr(sys.stdin, "buffer", None)
    return buffer or io.BytesIO(sys.stdin.read().encode())


def decode(data: bytes, name: str) -> str:
    """Decodes UTF-8 and drops a byte order mark; a line feed alone ends lines.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
            "convert it first, for example with iconv"
        ) from None
    return text.replace("\r\n", "\n")


def prepare_stdout() -> None:
    """Makes stdout print a replacement for characters that its encoding does not have.

    What goes to a closed stdout is lost, as with Python's own `print`.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")


def write(text: str) -> None:
    """Writes a piece of a result to stdout and flushes it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """Escapes characters that control a terminal (ESC, BEL) or reverse the direction of text."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def fields(record: Any) -> dict[str, Any]:
    """Returns the fields of a frozen record, by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def write_json(value: dict[str, Any]) -> None:
    """Prints one JSON object; infinities and NaN become null."""
    text = json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        # A replacement would be another text, so the characters are escaped.
        text = json.dumps(_jsonable(value), indent=2, allow_nan=False)
    print(text)


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


def note(text: str, always: bool = False) -> None:
    """Prints a note to stderr, if that is a terminal or the note is for logs, too."""
    if always or sys.stderr.isatty():
        print(f"candle-llama: {text}", file=sys.stderr)


@contextlib.contextmanager
def warnings_as_notes(always: bool = False) -> Iterator[list[str]]:
    """Prints the warnings of the block as notes; yields the list that collects them."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield messages
        finally:
            messages.extend(str(warning.message) for warning in caught if warning.category is UserWarning)
    for message in messages:
        note(f"warning: {message}", always)


def table(rows: list[tuple[str, str]]) -> str:
    """Returns names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{printable(name):<{width}}  {printable(value)}".rstrip() for name, value in rows)


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
