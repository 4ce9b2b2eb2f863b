"""Which form an answer must have: the one place where requests' grammars reach the engine."""

import dataclasses
from typing import Any

from candle_llama.server import errors
from candle_llama.server.schema import (
    AllowedToolChoice,
    ChatRequest,
    NamedTool,
    ResponseFormat,
    Sampling,
    Tool,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Constraint:
    """The form that an answer must have.

    Attributes:
        given: The engine's keyword; empty if the form is free.
        fields: The request's field for that keyword, as `errors.of_request` expects it.
    """

    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    fields: dict[str, str] = dataclasses.field(default_factory=dict)


def constraint(body: Sampling) -> Constraint:
    """Returns the form of the answer.

    Raises:
        ApiError: A field asks for what cannot be constrained, or two fields ask for a form.
    """
    asked = {
        name: Constraint({name: value})
        for name in ("regex", "grammar")
        if (value := getattr(body, name)) is not None
    }
    if isinstance(body, ChatRequest):
        asked |= _of_format(body.response_format) | _of_tools(body)
    if len(asked) > 1:
        raise errors.refused(list(asked)[1], f"{' and '.join(asked)} exclude each other")
    return next(iter(asked.values()), Constraint())


def _schema(schema: dict[str, Any], field: str) -> Constraint:
    return Constraint({"json_schema": schema}, {"json_schema": field})


def _of_format(response_format: ResponseFormat | None) -> dict[str, Constraint]:
    if response_format is None or response_format.type == "text":
        return {}
    if response_format.type == "json_object":
        return {"response_format": _schema({"type": "object"}, "response_format")}
    if response_format.json_schema is None:
        raise errors.refused("response_format.json_schema", "missing")
    schema = response_format.json_schema.schema_ or {}
    return {"response_format": _schema(schema, "response_format.json_schema.schema")}


def allowed(body: ChatRequest) -> list[Tool]:
    """Returns the functions that the model may know.

    Raises:
        ApiError: `tool_choice` allows a function that `tools` does not have.
    """
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none":
        return []
    if not isinstance(choice, AllowedToolChoice):
        return tools
    names = [tool.function.name for tool in choice.allowed_tools.tools]
    for name in names:
        _named(tools, name)
    return [tool for tool in tools if tool.function.name in names]


def demanded(body: ChatRequest) -> list[Tool]:
    """Returns the functions of which the answer must call one; empty if it need not.

    Raises:
        ApiError: `tools` does not have them.
    """
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return _named(body.tools or [], choice.function.name)
    if isinstance(choice, AllowedToolChoice):
        choice = choice.allowed_tools.mode
    if choice == "required":
        if not (tools := allowed(body)):
            raise errors.refused("tool_choice", "tools is empty")
        return tools
    # With "auto", a call begins in free text and cannot be constrained, `strict` or not.
    return []


def _named(tools: list[Tool], name: str) -> list[Tool]:
    if not (named := [tool for tool in tools if tool.function.name == name]):
        raise errors.refused("tool_choice", f"tools has no function {errors.shown(name)!r}")
    return named


def _of_tools(body: ChatRequest) -> dict[str, Constraint]:
    if not (tools := demanded(body)):
        return {}
    names = errors.shown(", ".join(tool.function.name for tool in tools))
    # The engine does not say which of several functions it means.
    field = f"tools: the parameters of one of {names}"
    if len(tools) == 1:
        field = f"tools.{(body.tools or []).index(tools[0])}.function.parameters: the function {names}"
    return {"tool_choice": _schema(_call(tools), field)}


def _call(tools: list[Tool]) -> dict[str, Any]:
    """A schema of one call of one of the tools, in the form that `tools.py` reads.

    Raises:
        ApiError: A function's schema is nested too deep.
    """
    try:
        return {"anyOf": _calls(tools)}
    except RecursionError:
        raise errors.refused("tools", "the parameters of a function are nested too deep") from None


def _calls(tools: list[Tool]) -> list[dict[str, Any]]:
    return [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": _moved(
                    tool.function.parameters or {"type": "object"}, f"#/anyOf/{index}/properties/arguments"
                ),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]


def _moved(schema: Any, place: str) -> Any:
    """Returns a schema whose references into itself are right at another place of a larger schema."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(item, place) for name, item in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = place + reference.removeprefix("#")
    return moved
