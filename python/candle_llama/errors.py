"""The exceptions of this package, whose attributes hold the details.

A missing file or model is a `FileNotFoundError`, a bad argument a `ValueError` or a `TypeError`;
all other errors derive from `CandleLlamaError`. Attributes that do not apply to an error are None.

Example:
    >>> import candle_llama
    >>> error = candle_llama.ContextLengthError("too long", prompt_tokens=9000, context_length=8192)
    >>> error.prompt_tokens - error.context_length
    808
"""

from typing import Any


class CandleLlamaError(Exception):
    """The base class of this package's errors.

    Args:
        message: What happened, in one line.
        hint: What to do about it, in one line.
        **facts: The values behind the message; each becomes an attribute.
    """

    hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None, **facts: Any) -> None:
        super().__init__(message)
        self.hint = hint
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}; {self.hint}" if self.hint else message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args[0], self.hint, self.facts)


class CheckpointError(CandleLlamaError):
    """The files of a model are broken, incomplete, refused by `strict`, or cannot be downloaded."""

    path: str | None = None
    tensor: str | None = None
    got: Any = None
    expected: Any = None
    limit: int | None = None


class UnsupportedModelError(CandleLlamaError):
    """The files are valid, but this version, or the chosen engine, cannot run the model exactly."""

    key: str | None = None
    value: Any = None


class ContextLengthError(CandleLlamaError):
    """The prompt leaves no room in the context."""

    prompt_tokens: int | None = None
    context_length: int | None = None


class DeviceError(CandleLlamaError):
    """The device is unknown, not compiled in, not present, or has too little memory for the model."""

    device: str | None = None
    needed: int | None = None
    available: int | None = None


class GenerationError(CandleLlamaError):
    """Processing the prompt or generating tokens failed; the model stays usable."""


class InternalError(CandleLlamaError):
    """A bug in candle-llama; please report it."""


def _rebuild(
    cls: type[CandleLlamaError], message: str, hint: str | None, facts: dict[str, Any]
) -> CandleLlamaError:
    return cls(message, hint=hint, **facts)
