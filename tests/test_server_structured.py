"""Constrained answers over HTTP, with the official client."""

import json
import re

import openai
import pytest
from pydantic import BaseModel

from serving import running

HELLO = [{"role": "user", "content": "Tell me about a city."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(demo_llm):
    with running(demo_llm, served_model_name="demo") as server, server.openai_client() as client:
        yield client


def ask(client, **options):
    options = {"model": "demo", "messages": HELLO, "max_tokens": 100, **options}
    return client.chat.completions.create(**options)


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_follows_its_schema(client, seed):
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    out = ask(client, response_format=wanted, temperature=1, seed=seed)
    assert out.choices[0].finish_reason == "stop"
    found = json.loads(out.choices[0].message.content)
    assert set(found) == {"name", "size"}
    assert found["size"] in ("small", "large")


def test_a_pydantic_model_is_parsed_by_the_client(client):
    class City(BaseModel):
        name: str
        is_large: bool

    out = client.chat.completions.parse(
        model="demo",
        messages=HELLO,
        max_tokens=200,
        response_format=City,
        temperature=0,
        extra_body={"repetition_penalty": 1.3},
    )
    assert isinstance(out.choices[0].message.parsed, City)


def test_other_forms(client):
    out = ask(client, extra_body={"regex": "[A-F]{3}[0-9]"}, temperature=1, seed=1)
    assert re.fullmatch("[A-F]{3}[0-9]", out.choices[0].message.content)
    text = client.completions.create(
        model="demo", prompt="The answer is", max_tokens=20, extra_body={"grammar": 'start: " yes" | " no"'}
    )
    assert text.choices[0].text in (" yes", " no")
    streamed = ask(client, extra_body={"regex": "[a-c]{5}"}, stream=True)
    assert re.fullmatch("[a-c]{5}", "".join(chunk.choices[0].delta.content or "" for chunk in streamed))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_is_demanded_is_made(client, choice):
    out = ask(client, tools=[ADD], tool_choice=choice, temperature=1, seed=4)
    (call,) = out.choices[0].message.tool_calls
    assert out.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "add"
    assert 0 <= json.loads(call.function.arguments)["a"] <= 99
    pieces = [
        piece
        for chunk in ask(client, tools=[ADD], tool_choice=choice, temperature=1, seed=4, stream=True)
        for piece in chunk.choices[0].delta.tool_calls or []
    ]
    assert pieces[0].function.name == "add"
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments


def test_the_beginning_of_a_demanded_call_is_no_content(client):
    for limit in (1, 6):
        options = {"tools": [ADD], "tool_choice": "required", "max_tokens": limit, "temperature": 0}
        (choice,) = ask(client, **options).choices
        assert (choice.finish_reason, choice.message.content) == ("length", None)
        assert choice.message.tool_calls is None
        *chunks, last = ask(client, stream=True, **options)
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
        assert last.choices[0].finish_reason == "length"


def test_a_schema_of_a_function_may_refer_to_its_own_parts(client):
    parameters = {
        "type": "object",
        "properties": {"size": {"$ref": "#/$defs/Size"}},
        "required": ["size"],
        "additionalProperties": False,
        "$defs": {"Size": {"enum": ["small", "large"]}},
    }
    choose = {"type": "function", "function": {"name": "choose", "parameters": parameters}}
    for tools in ([choose], [ADD, choose]):
        choice = {"type": "function", "function": {"name": "choose"}}
        out = ask(client, tools=tools, tool_choice=choice, temperature=1, seed=2)
        assert json.loads(out.choices[0].message.tool_calls[0].function.arguments)["size"] in (
            "small",
            "large",
        )
    assert ask(client, tools=[ADD, choose], tool_choice="required").choices[0].message.tool_calls


def test_a_function_whose_schema_is_nested_deep_is_refused(client):
    deep = {"type": "object"}
    for _ in range(450):
        deep = {"allOf": [deep]}
    tool = {"type": "function", "function": {"name": "deep", "parameters": deep}}
    with pytest.raises(openai.BadRequestError):
        ask(client, tools=[tool], tool_choice="required")


def test_strict_functions_are_accepted_where_calls_are_free(client):
    strict = {**ADD, "function": {**ADD["function"], "strict": True}}
    assert ask(client, tools=[strict], max_tokens=5).choices[0].message.role == "assistant"


BAD = {"type": "object", "not": {}}


def tool(name, parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}}},
            "response_format.json_schema.schema",
            "response_format.json_schema.schema: Unimpl",
        ),
        (
            {
                "tools": [ADD, tool("bad", BAD)],
                "tool_choice": {"type": "function", "function": {"name": "bad"}},
            },
            "tools.1.function.parameters",
            "tools.1.function.parameters: the function bad: Unimpl",
        ),
        (
            {"tools": [ADD, tool("bad", BAD)], "tool_choice": "required"},
            "tools",
            "tools: the parameters of one of add, bad: Unimpl",
        ),
    ],
)
def test_a_bad_schema_is_named_by_its_field(client, options, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert (caught.value.param, caught.value.body["message"][: len(message)]) == (param, message)


def test_what_cannot_be_constrained_is_refused(client):
    bad = {"name": "x", "schema": {"type": "object", "unevaluatedProperties": False, "not": {}}}
    for options, param in [
        ({"response_format": {"type": "json_schema", "json_schema": bad}}, None),
        ({"extra_body": {"regex": "(["}}, None),
        ({"extra_body": {"regex": "a", "grammar": "start: /a/"}}, "grammar"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **options)
        assert param is None or caught.value.param == param
