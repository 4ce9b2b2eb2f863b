"""Tool calls and their results in chat templates that expect other forms of them.

The templates write calls as those of well-known models do.
"""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

import candle_llama
from jinja_reference import TOOLS

CITY = {"city": "Köln"}
# Llama 3's, among many: JSON of a dict.
DICT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}'
    "{% endfor %}{% elif m.role == 'tool' and (m.content is mapping or m.content is iterable) %}"
    "{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
# MiniCPM's and Qwen3-Coder's.
ITEMS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}:{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
# DeepSeek R1's: a call is where content is none, and arguments are text.
NONE_AND_TEXT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for call in m['tool_calls'] %}{{ call['function']['name'] + ' ' + call['function']['arguments'] }}"
    "{% endfor %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


class Function(pydantic.BaseModel):
    name: str
    arguments: str


class Call(pydantic.BaseModel):
    id: str
    type: str
    function: Function


class Answer(pydantic.BaseModel):
    """A message as OpenAI's package returns it."""

    role: str = "assistant"
    content: str | None = None
    tool_calls: list[Call]


def conversation(arguments: Any, **content: Any) -> list[Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]


def rendered(tokenizer: candle_llama.Tokenizer, template: str, messages: list[Any]) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=False)


def with_object(arguments: str) -> list[Any]:
    user, answer, result = conversation(arguments)
    return [user, Answer(tool_calls=answer["tool_calls"]), result]


TEXT = json.dumps(CITY, ensure_ascii=False)
CONVERSATIONS = {
    "none, JSON": conversation(TEXT, content=None),
    "none, dict": conversation(CITY, content=None),
    "missing, JSON": conversation(TEXT),
    "missing, dict": conversation(CITY),
    "object": with_object(TEXT),
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(
    ("template", "call"),
    [
        (DICT, '{"name": "get_weather", "parameters": {"city": "Köln"}}'),
        (ITEMS, "get_weather:city=Köln"),
        (NONE_AND_TEXT, 'get_weather {"city": "Köln"}'),
    ],
    ids=["dict", "items", "text"],
)
def test_a_call_has_the_form_that_the_template_expects(
    tokenizer: candle_llama.Tokenizer, template: str, call: str, messages: list[Any]
) -> None:
    result = '"sunny"' if template == DICT else "sunny"
    assert rendered(tokenizer, template, messages) == f"<user>Q?<assistant>{call}<tool>{result}"


def test_arguments_with_the_word_none_stay(tokenizer: candle_llama.Tokenizer) -> None:
    messages = conversation('{"city": "None"}', content=None)
    text = rendered(tokenizer, NONE_AND_TEXT, messages)
    assert text == '<user>Q?<assistant>get_weather {"city": "None"}<tool>sunny'


@pytest.mark.parametrize("arguments", ["no json", "[1]", "[" * 100_000])
def test_arguments_that_are_no_json_of_a_dict_stay(tokenizer: candle_llama.Tokenizer, arguments: str) -> None:
    text = rendered(tokenizer, NONE_AND_TEXT, conversation(arguments, content=None))
    assert f"get_weather {arguments}<tool>" in text
    assert f'"parameters": {json.dumps(arguments)}' in rendered(tokenizer, DICT, conversation(arguments))


@pytest.mark.parametrize("text", ["sunny", "sunny\nwarm", 'a "b"', "Größe"])
def test_a_result_in_parts_is_as_one_that_is_a_string(tokenizer: candle_llama.Tokenizer, text: str) -> None:
    whole, parts = conversation(CITY), conversation(CITY)
    whole[2]["content"], parts[2]["content"] = text, [{"type": "text", "text": text}]
    assert rendered(tokenizer, DICT, parts) == rendered(tokenizer, DICT, whole)
    assert rendered(tokenizer, ITEMS, parts) == rendered(tokenizer, ITEMS, whole)


@pytest.mark.parametrize("calls", [5, True, "x", {"a": 1}, [None, 3, {"function": "f"}, {"name": "f"}]])
def test_what_is_no_call_reaches_the_template(tokenizer: candle_llama.Tokenizer, calls: Any) -> None:
    messages = [{"role": "assistant", "content": "hi", "tool_calls": calls}]
    text = rendered(tokenizer, "{{ messages[0].tool_calls | tojson }}{{ messages[0].content }}", messages)
    assert text == json.dumps(calls) + "hi"


def test_tools_that_the_template_never_reads_are_warned_about(tokenizer: candle_llama.Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    template = "{{ messages[0].content }}"
    with pytest.warns(UserWarning, match="never reads 'tools'"):
        tokenizer.apply_chat_template(messages, chat_template=template, tools=TOOLS)
    assert tokenizer.apply_chat_template(messages, chat_template=template, tools=[]) == "hi"
    tokenizer.apply_chat_template(messages, chat_template=template + "{{ tools }}", tools=TOOLS)


def test_continue_final_message_is_a_bool(tokenizer: candle_llama.Tokenizer) -> None:
    with pytest.raises(TypeError, match="continue_final_message must be a bool"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}],
            chat_template="{{ messages }}",
            continue_final_message="reasoning_content",  # type: ignore[arg-type]
        )
