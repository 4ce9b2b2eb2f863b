"""The Responses API with the official openai client: texts, functions, the events of streams."""

import json

import openai
import pytest

from serving import HELLO, is_idle, running, until
from test_server_tools import FORMS, TOOLS, examples

GREEDY = {"model": "demo", "temperature": 0, "max_output_tokens": 60}
FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]

NAMED = {"type": "function", "name": "get_weather"}
WORD = {"type": "string", "minLength": 500}
LONG = [
    {
        "type": "function",
        "name": "say",
        "parameters": {"type": "object", "properties": {"word": WORD}, "required": ["word"]},
    }
]


@pytest.fixture(scope="module")
def server(demo_llm):
    with running(demo_llm, served_model_name="demo") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with server.openai_client() as client:
        yield client


def test_a_text_is_answered(client, demo_llm):
    response = client.responses.create(input="hello", instructions="Be brief.", metadata={"a": "b"}, **GREEDY)
    turns = [{"role": "system", "content": "Be brief."}, *HELLO]
    expected = demo_llm.chat(turns, temperature=0, max_tokens=60)
    assert response.output_text == expected.text
    assert response.status == "completed"
    assert response.usage.input_tokens == expected.prompt_tokens
    assert response.usage.output_tokens == len(expected.token_ids)
    assert response.metadata == {"a": "b"}
    assert response.output[0].status == "completed"


def test_an_answer_that_is_cut_off_is_incomplete(client):
    response = client.responses.create(input="hello", **{**GREEDY, "max_output_tokens": 2})
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize(("limit", "tools"), [(2, []), (60, LONG)])
def test_an_item_that_is_cut_off_is_incomplete_in_every_event(client, limit, tools):
    choice = "required" if tools else "auto"
    options = {**GREEDY, "max_output_tokens": limit, "tools": tools, "tool_choice": choice}
    events = list(client.responses.create(input="hello", stream=True, **options))
    (done,) = [event.item for event in events if event.type == "response.output_item.done"]
    assert done.type == ("function_call" if tools else "message")
    assert done.status == events[-1].response.output[-1].status == "incomplete"
    assert events[-1].type == "response.incomplete"


def test_a_stream_has_the_events_of_openai(client):
    events = list(client.responses.create(input="hello", stream=True, **GREEDY))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert text == client.responses.create(input="hello", **GREEDY).output_text


def test_the_clients_own_stream_helper_understands_it(client):
    with client.responses.stream(input="hello", **GREEDY) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text


@pytest.mark.parametrize("form", FORMS)
def test_a_call_of_a_function(client, form):
    options = {"input": examples(form), "tools": FUNCTIONS, **GREEDY}
    (call,) = client.responses.create(**options).output
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "get_weather",
        {"city": "Rome"},
    )
    events = list(client.responses.create(stream=True, **options))
    assert events[2].type == "response.output_item.added"
    assert (events[2].item.name, events[2].item.arguments) == ("get_weather", "")
    pieces = [one.delta for one in events if one.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(pieces)) == {"city": "Rome"}
    assert events[-1].response.output[0].arguments == "".join(pieces)


def test_a_conversation_goes_on_after_a_call(client):
    first = client.responses.create(input=examples(FORMS[0]), tools=FUNCTIONS, **GREEDY)
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "sunny"}
    response = client.responses.create(
        input=[*examples(FORMS[0]), *first.output, result], tools=FUNCTIONS, **GREEDY
    )
    assert response.usage.input_tokens > first.usage.input_tokens


def test_an_answer_follows_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "person", "schema": schema}
    response = client.responses.create(input="hello", text={"format": form}, **GREEDY)
    assert response.status == "completed"
    assert 0 <= json.loads(response.output_text)["age"] <= 150


def test_a_call_can_be_demanded(client):
    choice = {"type": "function", "name": "get_weather"}
    response = client.responses.create(
        input="hello", tools=FUNCTIONS, tool_choice=choice, **{**GREEDY, "max_output_tokens": 200}
    )
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "get_weather")


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_functions_are_called(client, mode):
    tools = [*LONG, *FUNCTIONS]
    choice = {"type": "allowed_tools", "mode": mode, "tools": [NAMED]}
    response = client.responses.create(input=examples(FORMS[1]), tools=tools, tool_choice=choice, **GREEDY)
    assert response.output[0].name == "get_weather"
    assert response.tool_choice.mode == mode


def test_hints_of_functions_and_texts_are_ignored(client):
    harmless = {
        "defer_loading": False,
        "async": False,
        "allowed_callers": ["direct", "programmatic"],
        "output_schema": {"type": "string"},
    }
    parts = [{"type": "input_text", "text": "hello", "prompt_cache_breakpoint": {"mode": "explicit"}}]
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    first, second = (
        client.responses.create(input=turns, tools=[{**FUNCTIONS[0], **extra}], **GREEDY)
        for turns, extra in [
            ([{"role": "user", "content": parts}, refusal, *HELLO], harmless),
            ([*HELLO, {"role": "assistant", "content": "no"}, *HELLO], {}),
        ]
    )
    assert first.output_text == second.output_text
    assert first.usage.input_tokens == second.usage.input_tokens


def test_an_answer_can_be_sent_back(client):
    first = client.responses.create(input=HELLO, **GREEDY)
    again = [*HELLO, *first.output, {"role": "user", "content": [{"type": "input_text", "text": "and"}]}]
    assert client.responses.create(input=again, **GREEDY).output_text


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"previous_response_id": "a"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "image", "image": "x"}]}, "input.0"),
        ({"input": "x " * 30_000}, "input"),
        ({"text": {"format": {"type": "json"}}}, "text.format.type"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
            "text.format.schema",
        ),
        (
            {
                "tools": [{"type": "function", "name": "a", "parameters": {"not": {}}}],
                "tool_choice": "required",
            },
            "tools.0.parameters",
        ),
        ({"tools": [{**FUNCTIONS[0], "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [{**FUNCTIONS[0], "async": True}]}, "tools.0.async"),
        ({"tools": [{**FUNCTIONS[0], "allowed_callers": ["programmatic"]}]}, "tools.0.allowed_callers"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}}, "tool_choice"),
        ({"temperature": -1}, "temperature"),
        ({"extra_body": {"mood": 1}}, "mood"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_refused_is_named(client, extra, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"input": "hello", **GREEDY, **extra})
    assert caught.value.param.startswith(param)


CALL = {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": "{}"}


@pytest.mark.parametrize(
    ("item", "param", "message"),
    [
        (CALL | {"namespace": "a"}, "input.0.namespace", "None"),
        (CALL | {"arguments": {}}, "input.0.arguments", "valid string"),
        ({"type": "function_call"}, "input.0.call_id", "required"),
        ({"type": "function_call_output", "call_id": "a"}, "input.0.output", "required"),
        ({"role": "tool", "content": "x"}, "input.0.role", "'user'"),
        ({"type": "message", "role": "user"}, "input.0.content", "required"),
        ({"type": "reasoning", "summary": [], "foo": 1}, "input.0.foo", "unknown field"),
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            "input.0.content.0.type",
            "input_image; this server reads text only",
        ),
        ({"type": "image"}, "input.0", "knows message, function_call, function_call_output, reasoning"),
        ({"type": ["message"], "role": "user"}, "input.0", "unknown type"),
    ],
    ids=str,
)
def test_the_wrong_field_of_an_item_is_named(client, item, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.responses.create(input=[item], **GREEDY)
    assert caught.value.param == param


def test_items_may_have_fields_that_are_null(client):
    # As model_dump of the client's own types writes them.
    nulls = dict.fromkeys(("id", "status", "caller", "namespace", "async"))
    output = {"type": "function_call_output", "call_id": "a", "output": "sunny"}
    lengths = [
        client.responses.create(input=[*HELLO, *items, output], tools=FUNCTIONS, **GREEDY).usage.input_tokens
        for items in ([*HELLO, CALL], [HELLO[0] | {"type": None}, CALL | nulls])
    ]
    assert lengths[0] == lengths[1]


def test_a_server_that_stops_ends_the_stream(server, client, demo_llm):
    stream = client.responses.create(
        input="hello", stream=True, model="demo", max_output_tokens=900, extra_body={"seed": 1}, temperature=2
    )
    next(stream)
    server.call(server.state.stop)
    *_, last = stream
    server.state.is_stopping = False
    assert last.type == "response.failed"
    assert last.response.error.code == "server_error"
    until(lambda: is_idle(demo_llm))
