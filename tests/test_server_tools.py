"""Calls of functions: found in what models write, in one piece or in many, and sent to the client."""

import itertools
import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from candle_llama.server import conversation
from candle_llama.server.chat import joined
from candle_llama.server.schema import ChatMessage
from candle_llama.server.tools import CallArguments, CallStart, Text, ToolParser
from serving import running

NAMES = {"add", "get_weather"}
ADD = '{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}'
ADD_ARGUMENTS = '{"a": 1, "b": [2, "}"]}'


def parsed(text, most=None, pieces=None):
    """Returns the text and the calls, as (name, arguments)."""
    parser = ToolParser(NAMES, most)
    events = [event for piece in pieces or [text] for event in parser.feed(piece)] + parser.finish()
    text, calls = joined(events)
    return text, [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


CALLS = {
    "Hermes": (f"<tool_call>\n{ADD}\n</tool_call>", "", [("add", ADD_ARGUMENTS)]),
    "Hermes, two": (
        f"<tool_call>{ADD}</tool_call>\n<tool_call>{ADD}</tool_call>",
        "\n",
        [("add", ADD_ARGUMENTS)] * 2,
    ),
    "SmolLM2": (f"<tool_call>[{ADD}, {ADD}]</tool_call>", "", [("add", ADD_ARGUMENTS)] * 2),
    "text around": (f"I add. <tool_call>{ADD}</tool_call> Done.", "I add.  Done.", [("add", ADD_ARGUMENTS)]),
    "not closed": (f"<tool_call>{ADD}", "", [("add", ADD_ARGUMENTS)]),
    "half closed": (f"<tool_call>{ADD}</tool_", "", [("add", ADD_ARGUMENTS)]),
    "Llama 3.1": (
        '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1}}',
        "",
        [("add", '{"a": 1}')],
    ),
    "Llama 3.2": ('{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    "Llama 3.2, two": (
        '\n{"name": "add", "parameters": {}}; {"name": "get_weather", "parameters": {"c": "x"}}',
        "",
        [("add", "{}"), ("get_weather", '{"c": "x"}')],
    ),
    "arguments first": ('{"arguments": {"a": 1}, "name": "add"}', "", [("add", '{"a": 1}')]),
    "arguments as text": ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [("add", '{"a": 1}')]),
    "no arguments": ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    "null": ('{"name": "add", "arguments": null}', "", [("add", "{}")]),
    "cut off": ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
}

TEXTS = [
    "",
    " \n",
    "The sum is 3.",
    "if a < b: <tool",
    "<tool_call>",
    "<tool_call>soon</tool_call>",
    "<tool_call><tool_call>",
    '{"answer": 3}',
    "{1, 2, 3}",
    "[1, 2, 3]",
    "{",
    '{"name": "other", "arguments": {}}',
    '<tool_call>{"name": "other", "arguments": {"a": 1}}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '{"name": "add", "arguments": [1]}',
    '{"name"',
    "<|python_tag|>print(1)",
    "  {not json",
    'In JSON: {"name": "add", "arguments": {}}',
]


@pytest.mark.parametrize(("written", "text", "calls"), CALLS.values(), ids=CALLS)
def test_calls_are_found(written, text, calls):
    assert parsed(written) == (text, calls)
    assert parsed(written, pieces=list(written)) == (text, calls)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_call_is_text(text):
    assert parsed(text) == (text, [])
    assert parsed(text, pieces=list(text)) == (text, [])


def test_a_call_behind_something_like_a_call_is_found():
    assert parsed(f"<tool_call>no <tool_call>{ADD}</tool_call>") == (
        "<tool_call>no ",
        [("add", ADD_ARGUMENTS)],
    )


def test_what_follows_the_last_allowed_call_is_dropped():
    assert parsed(f"<tool_call>[{ADD}, {ADD}]</tool_call> and", most=1) == ("", [("add", ADD_ARGUMENTS)])


@given(
    written=st.one_of(
        st.sampled_from([case[0] for case in CALLS.values()] + TEXTS),
        st.lists(
            st.sampled_from(
                ["<tool_call>", "</tool_call>", ADD, "<", "{", "}", '"', "[", ";", " a ", '{"name']
            )
        ).map("".join),
    ),
    cuts=st.lists(st.integers(0, 200)),
)
def test_pieces_do_not_matter(written, cuts):
    ends = [0, *sorted(min(cut, len(written)) for cut in cuts), len(written)]
    pieces = [written[a:b] for a, b in itertools.pairwise(ends)]
    assert parsed(written, pieces=pieces) == parsed(written)


@given(
    st.dictionaries(
        st.text(max_size=5), st.recursive(st.text() | st.integers() | st.booleans(), st.lists, max_leaves=5)
    ),
    st.booleans(),
)
def test_arguments_arrive_as_they_were_written(arguments, is_ascii):
    written = json.dumps(arguments, ensure_ascii=is_ascii)
    call = json.dumps({"name": "add", "arguments": arguments}, ensure_ascii=is_ascii)
    assert parsed(f"<tool_call>{call}</tool_call>") == ("", [("add", written)])


@pytest.mark.parametrize("text", ["", "\n", "{", '{\n    "nam', '{"name": "add", "arg', '{"name": "add"'])
def test_the_beginning_of_a_demanded_call_is_no_text(text):
    for pieces in ([text], list(text)):
        parser = ToolParser(NAMES, is_demanded=True)
        assert [event for piece in pieces for event in parser.feed(piece)] + parser.finish() == []
    parser = ToolParser(NAMES, is_demanded=True)
    assert joined([*parser.feed(ADD[:40]), *parser.finish()])[1][0]["function"]["arguments"] == ADD[29:40]
    assert joined([*ToolParser(NAMES, is_demanded=True).feed("no call")]) == ("no call", [])


def test_arguments_are_passed_on_at_once():
    parser = ToolParser(NAMES)
    assert parser.feed("Well, <tool_") == [Text("Well, ")]
    assert parser.feed('call>{"name": "add", "argum') == []
    start, piece = parser.feed('ents": {"a": ')
    assert start.name == "add"
    assert piece == CallArguments(0, '{"a": ')
    assert parser.feed("1}}") == [CallArguments(0, "1}")]


def test_the_first_event_of_a_call_has_its_name():
    first, second = ToolParser(NAMES).feed(ADD)
    assert isinstance(first, CallStart)
    assert first.id.startswith("call_")
    assert second == CallArguments(0, ADD_ARGUMENTS)


def test_messages_keep_what_the_client_sent():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    (turn,) = conversation.messages([ChatMessage(role="assistant", tool_calls=[call])])
    assert turn == {"role": "assistant", "content": None, "tool_calls": [call]}
    (turn,) = conversation.messages([ChatMessage(role="assistant", content="", tool_calls=[call])])
    assert turn["content"] is None
    (turn,) = conversation.messages([ChatMessage(role="assistant")])
    assert turn == {"role": "assistant", "content": ""}


# --- with a model: the demo repeats the form of the answers before ---

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
FORMS = [
    '<tool_call>[{"name": "get_weather", "arguments": {"city": "%s"}}]</tool_call>',
    '{"name": "get_weather", "parameters": {"city": "%s"}}',
]


def examples(form):
    messages = []
    for city in ("Paris", "Berlin", "Madrid"):
        messages.append({"role": "user", "content": f"What is the weather in {city}?"})
        messages.append({"role": "assistant", "content": form % city})
    return [*messages, {"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture(scope="module")
def client(demo_llm):
    with running(demo_llm, served_model_name="demo") as server, server.openai_client() as client:
        yield client


def ask(client, messages, **options):
    options = {"tools": TOOLS, "max_tokens": 60, "temperature": 0, **options}
    return client.chat.completions.create(model="demo", messages=messages, **options)


@pytest.mark.parametrize("form", FORMS)
def test_a_call_reaches_the_client(client, form):
    choice = ask(client, examples(form)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_streamed(client, form):
    chunks = [chunk.choices[0] for chunk in ask(client, examples(form), stream=True)]
    assert chunks[-1].finish_reason == "tool_calls"
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert calls[0].id
    assert (calls[0].index, calls[0].type, calls[0].function.arguments) == (0, "function", "")
    assert calls[0].function.name == "get_weather"
    # How many pieces there are depends on how fast they are read.
    assert len(calls) > 1
    assert all(call.id is call.type is call.function.name is None for call in calls[1:])
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Rome"}
    assert not any(chunk.delta.content for chunk in chunks)


def test_a_conversation_goes_on_after_a_call(client):
    messages = examples(FORMS[0])
    answer = ask(client, messages).choices[0].message
    result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "sunny"}
    assert ask(client, [*messages, answer, result], max_tokens=5).choices[0].message


OTHER = {"type": "function", "function": {"name": "get_time", "description": "The time."}}


def allow(mode, name):
    tools = [{"type": "function", "function": {"name": name}}]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_functions_are_called(client, mode):
    messages = examples(FORMS[1])
    choice = ask(client, messages, tools=[OTHER, *TOOLS], tool_choice=allow(mode, "get_weather")).choices[0]
    assert choice.message.tool_calls[0].function.name == "get_weather"
    message = (
        ask(client, messages, tools=[OTHER, *TOOLS], tool_choice=allow(mode, "get_time")).choices[0].message
    )
    names = {call.function.name for call in message.tool_calls or []}
    assert names == ({"get_time"} if mode == "required" else set())


def test_functions_that_are_not_allowed_are_hidden_from_the_model(client):
    tokens = [
        ask(client, examples(FORMS[1]), max_tokens=1, **options).usage.prompt_tokens
        for options in (
            {"tools": TOOLS},
            {"tools": [OTHER, *TOOLS], "tool_choice": allow("auto", "get_weather")},
        )
    ]
    assert tokens[0] == tokens[1]


def test_without_tools_a_call_is_text(client):
    for options in ({"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}):
        message = ask(client, examples(FORMS[1]), **options).choices[0].message
        assert message.tool_calls is None
        assert "get_weather" in message.content
