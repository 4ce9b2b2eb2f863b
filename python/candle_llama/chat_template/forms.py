"""The forms of a conversation that templates expect, found by rendering.

Templates do not say what they expect: content as a string or as a list of parts, none or an empty string
beside tool calls, the arguments of a call as a dict or as JSON. One that gets another form fails, leaves it
out, or prints it as Python or JSON. So the forms are rendered in turn, until a text keeps calls and content.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from candle_llama.chat_template import ChatTemplate

Messages = list[dict[str, Any]]


def render(template: ChatTemplate, given: dict[str, Any]) -> str:
    """Renders a template with the messages in the first form that it keeps.

    Raises:
        ValueError: It fails with each form. This is the error for the first one.
    """
    messages: Messages = given["messages"]
    error: ValueError | None = None
    best: tuple[tuple[bool, bool, int], str] | None = None
    for form in _forms(messages):
        try:
            text = template.render({**given, "messages": form})
        except ValueError as failed:
            error = error or failed
            continue
        keeps = (_keeps_calls(text, messages), _keeps_content(text, messages), -text.count("None"))
        if keeps == (True, True, 0):
            return text
        if best is None or keeps > best[0]:
            best = (keeps, text)
    if best is None:
        assert error is not None, "there is a form"
        raise error
    return best[1]


def _forms(messages: Messages) -> Iterator[Messages]:
    """Yields the forms of messages that differ, the one that most templates expect first."""
    seen: list[Messages] = []
    for form in (_with_calls(messages, _parsed), _with_calls(_with_content(messages), _as_json)):
        for one in (form, _with_text(form)):
            if one not in seen:
                seen.append(one)
                yield one


def _with_calls(messages: Messages, convert: Callable[[Any], Any]) -> Messages:
    """The messages with the arguments of tool calls converted."""

    def converted(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if "function" in call:
            return {**call, "function": converted(call["function"])}
        return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else call

    return [
        {**message, "tool_calls": [converted(call) for call in calls]}
        if (calls := _calls(message))
        else message
        for message in messages
    ]


def _with_content(messages: Messages) -> Messages:
    """The messages with content that is None where it is missing beside tool calls."""
    return [{"content": None, **message} if _calls(message) else message for message in messages]


def _calls(message: dict[str, Any]) -> list[Any] | tuple[Any, ...]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list | tuple) else ()


def _parsed(arguments: Any) -> Any:
    """The dict that JSON stands for; anything else as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return _json(arguments) if isinstance(arguments, dict) else arguments


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _with_text(messages: Messages) -> Messages:
    """The messages with their content as strings.

    The texts of a list of parts are joined by line ends, as by llama.cpp and vLLM. Content that is None or
    missing becomes empty.
    """
    return [{**message, "content": _text(message.get("content"))} for message in messages]


def _text(content: Any) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _keeps_calls(text: str, messages: Messages) -> bool:
    """Whether a rendered text has the name of each function that is called."""
    calls = [call for message in messages for call in _calls(message)]
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return all(
        str(function["name"]) in text
        for function in functions
        if isinstance(function, dict) and "name" in function
    )


def _keeps_content(text: str, messages: Messages) -> bool:
    """Whether a rendered text has the text of each part of content, and not the part as Python or JSON."""
    return all(
        str(part) not in text
        and _json(part) not in text
        and (part["text"].strip() in text or _json(part["text"].strip())[1:-1] in text)
        for message in messages
        if isinstance(content := message.get("content"), list | tuple)
        for part in content
    )
