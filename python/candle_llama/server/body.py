"""Reads a request's body: bounded bytes, JSON, and a model of `schema`."""

import json
from typing import Any, NoReturn, TypeVar

import pydantic
from starlette.requests import Request

from candle_llama.server import errors
from candle_llama.server.errors import ApiError
from candle_llama.server.limits import Limits
from candle_llama.server.schema import Strict

_T = TypeVar("_T", bound=Strict)

_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "best_of": (1,),
    "background": (False,),
    "include": ([],),
    "suffix": ("",),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Values of refused fields that ask for nothing."""


async def read(request: Request, kind: type[_T], limits: Limits) -> tuple[_T, int]:
    """Reads and checks a body.

    Returns:
        The body, and its size in bytes.

    Raises:
        ApiError: It is compressed, too large, no JSON, or has a field that is unknown, refused or wrong.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        # A browser sends other types to any server without asking it, also for a page of somebody else.
        raise ApiError(400, "the header Content-Type must be application/json", param="Content-Type")
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        message = f"Content-Encoding {errors.shown(encoding)} is not supported: send the body uncompressed"
        raise ApiError(415, message, param="Content-Encoding")
    data = await _bytes(request, limits.max_body_bytes)
    return checked(_json(data), kind), len(data)


def checked(content: Any, kind: type[_T]) -> _T:
    """Checks the fields of a body."""
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, reason in kind.REFUSED.items():
        value = content.pop(name, None)
        if value is not None and value not in _HARMLESS_VALUES.get(name, ()):
            raise errors.refused(name, reason, "unsupported_parameter")
    for name in kind.IGNORED:
        content.pop(name, None)
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        raise errors.of_validation(error) from None


async def _bytes(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    is_too_large = length.isascii() and length.isdigit() and len(length) < 20 and int(length) > limit
    if is_too_large and "expect" in request.headers:
        # The client waits for permission to send the body.
        raise _too_large(limit)
    data, received = bytearray(), 0
    async for part in request.stream():
        received += len(part)
        is_too_large = is_too_large or received > limit
        if not is_too_large:
            data += part
        elif received > 2 * limit:
            # Until then, the rest is read: a client that still sends when the connection is closed may lose
            # the answer.
            break
    if is_too_large:
        raise _too_large(limit)
    return bytes(data)


def _too_large(limit: int) -> ApiError:
    # There may be more of the body, so the connection cannot be used again.
    return ApiError(
        413,
        f"the body is larger than {limit} bytes, the limit of this server",
        headers={"Connection": "close"},
    )


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is no JSON that this server reads: it is nested too deep") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {errors.shown(str(error), 200)}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
