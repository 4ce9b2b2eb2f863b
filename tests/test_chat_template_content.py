"""Content that is a list of parts, None or missing, on templates that expect strings, and on others.

The templates print content as those of well-known models do.
"""

from __future__ import annotations

from typing import Any

import pytest

import candle_llama

PARTS = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
MESSAGES = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "hi"}]

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}"
JOINING = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
TRIMMING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
STRINGS_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"
)
SPLITTING = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}"
TAKES_BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
)
TESTS_FOR_NONE = (
    "{% for m in messages %}{% if m['content'] is none %}CALL {{ m['tool_calls'][0]['name'] }}"
    "{% else %}{{ m['content'] }}|{% endif %}{% endfor %}"
)


def rendered(tokenizer: candle_llama.Tokenizer, template: str, messages: list[Any]) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=False)


@pytest.mark.parametrize("template", [CHATML, JOINING, TRIMMING, STRINGS_ONLY, SPLITTING])
def test_parts_are_joined_where_the_template_expects_a_string(
    tokenizer: candle_llama.Tokenizer, template: str
) -> None:
    assert rendered(tokenizer, template, MESSAGES) == "<user>Hello \nyou<assistant>hi"


def test_a_template_that_takes_parts_gets_them(tokenizer: candle_llama.Tokenizer) -> None:
    assert rendered(tokenizer, TAKES_BOTH, MESSAGES) == "<user>[Hello ][you]<assistant>hi"


@pytest.mark.parametrize("empty", [{"content": None}, {}], ids=["None", "missing"])
@pytest.mark.parametrize("template", [CHATML, JOINING, TRIMMING, STRINGS_ONLY, SPLITTING])
def test_no_content_is_empty_where_the_template_expects_a_string(
    tokenizer: candle_llama.Tokenizer, template: str, empty: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "None"}, {"role": "assistant", **empty}]
    assert rendered(tokenizer, template, messages) == "<user>None<assistant>"


def test_a_template_that_tests_for_none_gets_it(tokenizer: candle_llama.Tokenizer) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]}
    assert rendered(tokenizer, TESTS_FOR_NONE, [{"role": "user", "content": "hi"}, call]) == "hi|CALL weather"


def test_an_error_of_the_template_stays(tokenizer: candle_llama.Tokenizer) -> None:
    with pytest.raises(ValueError, match="only the user"):
        rendered(tokenizer, "{{ raise_exception('only the user') }}", MESSAGES)


@pytest.mark.parametrize(
    "part", [{"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 3}]
)
def test_a_part_without_text_is_named(tokenizer: candle_llama.Tokenizer, part: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"messages\[1\]: content must be a str"):
        rendered(tokenizer, CHATML, [{"role": "user", "content": "a"}, {"role": "user", "content": [part]}])


class Model:
    """What a message of pydantic shows, such as one of the openai package."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump(self, exclude_none: bool = False) -> dict[str, Any]:
        return {key: value for key, value in self.fields.items() if value is not None or not exclude_none}


def test_objects_with_model_dump_are_messages(tokenizer: candle_llama.Tokenizer) -> None:
    messages = [Model(role="user", content="hi", name=None), {"role": "assistant", "content": "yo"}]
    assert rendered(tokenizer, CHATML, messages) == "<user>hi<assistant>yo"
    template = "{% for m in messages %}{{ m.keys() | list }}{% endfor %}"
    assert rendered(tokenizer, template, messages[:1]) == "['role', 'content']"
    with pytest.raises(TypeError, match=r"messages\[0\] must be a dict"):
        rendered(tokenizer, CHATML, [Model(content="hi")])
