"""Converts the extension's dicts to records: a whole completion, or a stream of chunks."""

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NoReturn, Self

from candle_llama import _core, structured
from candle_llama.types import Chunk, Completion, Stats, TokenLogprob

NOT_PICKLED = (
    "a stream cannot be pickled or copied: it is being generated in this process; "
    "pass its chunks on, or the prompt"
)


class Stream(Iterator[Chunk]):
    """The chunks of a completion, as they are generated.

    It ends with the completion. `close`, leaving a `with` block, or deleting the object stops it early. The
    model works on it while somebody waits for a chunk, or for another answer.
    """

    def __init__(self, core: _core.Stream) -> None:
        self._core = core

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        return chunk(next(self._core))

    def close(self) -> None:
        """Stops generating; the stream then ends. Closing twice is fine."""
        self._core.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _logprobs(entries: list[dict[str, Any]] | None) -> list[TokenLogprob] | None:
    return None if entries is None else [TokenLogprob(**entry) for entry in entries]


def completion(fields: dict[str, Any], given: Mapping[str, Any]) -> Completion:
    """Converts the extension's dict to a completion. `given` has the sampling parameters."""
    return Completion(
        **{**fields, "logprobs": _logprobs(fields["logprobs"]), "stats": Stats(**fields["stats"])},
        parsed=structured.parsed(given, fields),
    )


def chunk(fields: dict[str, Any]) -> Chunk:
    """Converts the extension's dict to a chunk."""
    stats = fields["stats"]
    return Chunk(
        **{
            **fields,
            "logprobs": _logprobs(fields["logprobs"]),
            "stats": None if stats is None else Stats(**stats),
        }
    )
