"""Constrained answers: what a caller may give, and what an answer is parsed to."""

import json
from collections.abc import Mapping
from typing import Any

from candle_llama.errors import GenerationError
from candle_llama.options import check_text

CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")
"""The parameters of which at most one may be given."""


class JsonSchema(str):
    """A JSON schema as JSON, for the extension, with the pydantic model that it was made from."""

    __slots__ = ("model",)
    model: Any


def json_schema(name: str, value: Any) -> JsonSchema:
    """Reads a schema from a dict, from JSON, or from a pydantic model, which is a class.

    Raises:
        TypeError: It is something else, or holds what JSON cannot express.
        ValueError: It is a text that is not JSON, or holds NaN.
    """
    if isinstance(value, JsonSchema):
        return value
    is_model = isinstance(value, type) and hasattr(value, "model_json_schema")
    if isinstance(value, str):
        check_text(value, name)
        schema = JsonSchema(value)
    elif is_model or isinstance(value, Mapping):
        given = _closed(value.model_json_schema()) if is_model else dict(value)
        try:
            schema = JsonSchema(json.dumps(given, allow_nan=False))
        except RecursionError:
            raise ValueError(f"{name} is nested too deeply") from None
    else:
        raise TypeError(f"{name} must be a dict, JSON, or a pydantic model class, not {type(value).__name__}")
    schema.model = value if is_model else None
    return schema


def _closed(schema: Any) -> Any:
    """Excludes properties that a pydantic model would ignore: without them, answers are shorter."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(item) for name, item in schema.items()}
    names_some = any(isinstance(schema.get(key), dict) for key in ("properties", "patternProperties"))
    if schema.get("type") == "object" and names_some:
        closed.setdefault("additionalProperties", False)
    return closed


def check_one(given: Mapping[str, Any]) -> None:
    """Raises TypeError if more than one constraint is given."""
    names = [name for name in CONSTRAINTS if given.get(name) is not None]
    if len(names) > 1:
        raise TypeError(f"give only one of {', '.join(names)}")


def parsed(given: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """Returns the object that a complete answer stands for: `Completion.parsed`.

    Raises:
        GenerationError: Python's json cannot read the answer.
        Exception: The pydantic model's own validators refuse it. A note of the error has the answer.
    """
    if fields["finish_reason"] != "stop":
        return None
    text = fields["text"]
    if (schema := given.get("json_schema")) is None:
        return text if "choice" in given else None
    if schema.model is not None:
        try:
            return schema.model.model_validate_json(text)
        except Exception as error:
            error.add_note(f"the answer is {text}")
            raise
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # more than 4,300 digits, or many levels
        raise GenerationError(f"Python cannot read the answer as JSON: {error}; it is {text}") from error
