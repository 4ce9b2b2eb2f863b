"""Messages and tools, as chat templates expect them."""

from collections.abc import Mapping, Sequence
from typing import Any

from candle_llama.chat_template import plain
from candle_llama.server import errors
from candle_llama.server.schema import ChatMessage, Tool, ToolCall
from candle_llama.tokenizer import Tokenizer

# A template of the client's would be a program of the client's.
_RESERVED = ("messages", "tools", "chat_template", "tokenize")
_ARGUMENTS = frozenset(("add_generation_prompt", "continue_final_message"))


def messages(given: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Returns the turns for the chat template."""
    return [_message(message) for message in given]


def tools(given: Sequence[Tool]) -> list[dict[str, Any]]:
    """Returns the descriptions of functions for the chat template."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in given
    ]


def variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns `chat_template_kwargs` for the chat template.

    Raises:
        ApiError: One has the name of something that the server sets.
    """
    for name in _RESERVED:
        if given and name in given:
            raise errors.refused(f"chat_template_kwargs.{name}", "not a variable of the template")
    return dict(given or {})


def read_variables(tokenizer: Tokenizer, given: Mapping[str, Any], has_tools: bool) -> dict[str, Any]:
    """Returns the variables that the chat template reads.

    The tokenizer would warn of the others, and Python remembers each text of a warning; clients choose these.
    """
    names = tokenizer._variable_names(has_tools) | _ARGUMENTS
    return {name: value for name, value in given.items() if name in names}


def read_tools(tokenizer: Tokenizer, given: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Returns the tools if the chat template reads them. The tokenizer would warn otherwise.

    Raises:
        ValueError: They are nested too deep, or too large.
    """
    if given and "tools" not in tokenizer._variable_names(True):
        plain(given)
        return None
    return given or None


def _message(message: ChatMessage) -> dict[str, Any]:
    # Templates know "system" only. Keys that are None are left out: templates test whether they are there.
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role}
    if isinstance(message.content, list):
        turn["content"] = [{"type": "text", "text": part.text} for part in message.content]
    else:
        nothing = None if message.tool_calls else ""
        turn["content"] = message.content or message.refusal or nothing
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            turn[name] = value
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    return turn


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"type": "function", "function": function, **({"id": call.id} if call.id else {})}
