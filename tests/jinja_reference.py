"""What transformers' own Jinja environment makes of a template, and a check of ours against it."""

import json
import warnings
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import pytest

import candle_llama

Messages = list[dict[str, Any]]


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text; what it holds is a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

    def _pass(self, caller: Any) -> str:
        return caller()


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def reference(template: str, **variables: Any) -> str:
    """What Jinja gives under transformers' settings."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template).render(**variables)


MESSAGES: Messages = [
    {"role": "system", "content": 'Be <nice> & "kind".'},
    {"role": "user", "content": "Hi there, it's é"},
    {"role": "assistant", "content": "  Hello\n"},
    {"role": "user", "content": "Bye"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <b>&",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "x"}, "n": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"name": "get_weather", "arguments": {"city": "Paris", "n": 3}}
CONVERSATIONS: dict[str, tuple[Messages, Any]] = {
    "one message": ([{"role": "user", "content": 'Hi <there> & "you"'}], None),
    "system": (MESSAGES, None),
    "tools": (MESSAGES[:2], TOOLS),
    "calls": (
        [
            MESSAGES[1],
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}],
            },
            {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny"},
            MESSAGES[3],
        ],
        TOOLS,
    ),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], None),
}


def rendered(
    tokenizer: candle_llama.Tokenizer,
    template: str,
    messages: Messages = MESSAGES,
    tools: Any = None,
    generation: bool = False,
) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the chat template never reads 'tools'")
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tools=tools, add_generation_prompt=generation
        )


def check(
    tokenizer: candle_llama.Tokenizer,
    special_tokens: dict[str, str],
    template: str,
    messages: Messages = MESSAGES,
    tools: Any = None,
    generation: bool = False,
) -> None:
    """The same text, or an error of the same kind.

    A template that fails with content parts, drops them or prints them as Python or JSON gets strings; one
    that fails with the dict of a call's arguments gets JSON.
    """

    def outcome(messages: Messages) -> str | Exception:
        try:
            return reference(
                template,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=generation,
                **special_tokens,
            )
        except Exception as error:
            return error

    expected = outcome(messages)
    parts = [
        part
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    ]
    if parts and (
        isinstance(expected, Exception)
        or "'type': 'text'" in expected
        or '"type": "text"' in expected
        or not all(part["text"] in expected for part in parts)
    ):
        expected = outcome(
            [
                {**message, "content": "\n".join(part["text"] for part in message["content"])}
                if isinstance(message.get("content"), list)
                else message
                for message in messages
            ]
        )
    if isinstance(expected, Exception) and any(message.get("tool_calls") for message in messages):
        as_json = outcome(
            [
                {**message, "tool_calls": [_with_json(call) for call in message["tool_calls"]]}
                if message.get("tool_calls")
                else message
                for message in messages
            ]
        )
        expected = as_json if isinstance(as_json, str) else expected
    if isinstance(expected, str):
        assert rendered(tokenizer, template, messages, tools, generation) == expected
        return
    with pytest.raises(ValueError, match=r"^chat template") as caught:
        print(expected, repr(rendered(tokenizer, template, messages, tools, generation)))
    assert type(caught.value.__cause__) is type(expected), (caught.value, expected)


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": tojson(function["arguments"])}}
