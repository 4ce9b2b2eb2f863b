"""Errors as OpenAI's clients expect them: a status, and an object with message, type, param and code."""

import json
import re
from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic_core import ErrorDetails
from starlette.responses import Response

from candle_llama.errors import CandleLlamaError, ContextLengthError, InternalError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_CODES = {
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "service_unavailable",
}
_MAX_SHOWN = 100
_KIND = re.compile(r"^(str|literal|list)$|[\[A-Z]")
_OUR_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "token_ids": "prompt"}
_ENGINE_NAME = re.compile(rf"\b({'|'.join(_OUR_NAMES)})\b")


class ApiError(Exception):
    """An error that the client gets.

    Attributes:
        status: The HTTP status.
        message: What happened, in one line.
        param: The request's field that is the cause.
        code: OpenAI's name of the error.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class JsonResponse(Response):
    """JSON in ASCII: other texts may hold surrogates, which UTF-8 does not have."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Writes the content."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def response(error: ApiError) -> JsonResponse:
    """Returns the response that reports an error."""
    return JsonResponse(error.body(), error.status, error.headers)


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """Returns the error of a field that the server does not accept."""
    return ApiError(400, f"{shown(param)}: {message}", param=shown(param), code=code)


def of_validation(error: pydantic.ValidationError) -> ApiError:
    """Converts one of pydantic's complaints; an unknown field comes before others."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(found, key=_weight)
    fields = _fields(first["loc"])
    if first["type"] == "extra_forbidden":
        # The last name is the client's, also if it looks like a union's kind.
        fields = [*_fields(first["loc"][:-1]), str(first["loc"][-1])]
        return refused(shown(".".join(fields)), "unknown field", "unknown_parameter")
    return refused(shown(".".join(fields)), first["msg"])


def _weight(complaint: ErrorDetails) -> tuple[bool, int, bool]:
    """Ranks complaints: of the kinds of a union, the one that fits best fails at the innermost field."""
    kind = complaint["type"]
    return kind == "extra_forbidden", len(_fields(complaint["loc"])), kind == "literal_error"


def _fields(location: tuple[int | str, ...]) -> list[str]:
    """Returns the names and indices without those of a union's kinds, such as "str" and "list[TextPart]"."""
    return [str(part) for part in location if not (isinstance(part, str) and _KIND.search(part))]


def of_request(error: Exception, fields: Mapping[str, str] | None = None) -> ApiError:
    """Converts an error of the engine about a request that it did not accept.

    Args:
        error: The error, whose message may begin with the engine's name of a parameter.
        fields: The fields that gave these parameters, where they have other names. A remark for the message
            may follow the field, behind a colon.
    """
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), param="prompt", code="context_length_exceeded")
    if isinstance(error, CandleLlamaError):
        return of_engine(error)
    message = _ENGINE_NAME.sub(lambda match: _OUR_NAMES[match[0]], shown(str(error), 2000))
    name = message.partition(":")[0]
    for parameter, field in (fields or {}).items():
        if re.match(rf"{parameter}\b", message):
            return ApiError(400, field + message[len(parameter) :], param=field.partition(":")[0])
    return ApiError(400, message, param=name if name.replace("_", "").isalnum() else None)


def of_engine(error: Exception) -> ApiError:
    """Converts an error that ended a generation."""
    if isinstance(error, ContextLengthError):
        return of_request(error)
    message = (
        str(error) if isinstance(error, CandleLlamaError) else "an error of the server; its log has more"
    )
    code = "internal_error" if isinstance(error, InternalError) else "generation_failed"
    return ApiError(500, message, code=code)


def shown(text: str, length: int = _MAX_SHOWN) -> str:
    """Shortens a text that a client may have chosen."""
    return text if len(text) <= length else f"{text[:length]}..."
