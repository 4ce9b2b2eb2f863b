"""What the server refuses, and how: fields, limits, keys, hostile bodies."""

import gzip
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import candle_llama
from candle_llama.server import build_app
from candle_llama.server.schema import ChatRequest, CompletionRequest
from serving import CHAT, HELLO, is_idle, running, until
from tiny import write_checkpoint

JSON = {"Content-Type": "application/json"}


def allow(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, served_model_name="tiny", max_body_bytes=200_000, max_queue=8) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def large(llm):
    """A client of a server that accepts bodies of 16 MiB."""
    with running(llm) as server, server.client() as client:
        yield client


def refused(client, path, body, status=400):
    """Posts a body, and returns OpenAI's error object."""
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    answer = client.post(path, content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages.0.mood"),
        ({"messages": HELLO, "mood": 1}, "mood"),
        ({"messages": HELLO, "maxTokens": 1}, "maxTokens"),
        ({"messages": [HELLO[0] | {"list": 1}]}, "messages.0.list"),
        ({"messages": HELLO, "temperature": "1"}, "temperature"),
        ({"messages": HELLO, "temperature": True}, "temperature"),
        ({"messages": HELLO, "temperature": -1}, "temperature"),
        ({"messages": HELLO, "top_p": 0}, "top_p"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "n": 9}, "n"),
        ({"messages": HELLO, "n": 2**31 - 1}, "n"),
        ({"messages": HELLO, "n": 1.5}, "n"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "logit_bias": {"a": 1}}, "logit_bias"),
        ({"messages": HELLO, "logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"messages": HELLO, "seed": 2**64}, "seed"),
        ({"messages": HELLO, "stop": ["a"] * 65}, "stop"),
        ({"messages": HELLO, "min_tokens": 2**70}, "min_tokens"),
        ({"messages": HELLO, "functions": []}, "functions"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities"),
        ({"messages": HELLO, "tools": [{"type": "custom"}]}, "tools.0.type"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"messages": HELLO, "tool_choice": allow("some", "f")}, "tool_choice.allowed_tools.mode"),
        ({"messages": HELLO, "tool_choice": allow("auto", "f")}, "tool_choice"),
        ({"messages": HELLO, "tool_choice": allow("required")}, "tool_choice"),
        ({"messages": HELLO, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools"),
    ],
)
def test_a_bad_field_of_a_chat_is_named(client, body, param):
    assert refused(client, CHAT, body)["param"] == param


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_a_part_that_is_no_text_is_named_by_its_type(client, role, kind):
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}, "detail": "low"}]
    error = refused(client, CHAT, {"messages": [{"role": role, "content": parts}]})
    assert error["message"] == f"messages.0.content.1.type: {kind}; this server reads text only"
    assert error["param"] == "messages.0.content.1.type"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": "a", "n": 2**31 - 1}, "n"),
    ],
)
def test_a_bad_field_of_a_completion_is_named(client, body, param):
    assert refused(client, "/v1/completions", body)["param"] == param


def test_a_token_that_does_not_exist_is_named_by_its_field(client):
    error = refused(client, "/detokenize", {"tokens": [999_999]})
    assert (error["param"], error["message"][:11]) == ("tokens", "tokens: got")


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_fields_without_effect_are_accepted_and_refused_ones_may_be_null(client, kind):
    path = CHAT if kind is ChatRequest else "/v1/completions"
    body = {"messages": HELLO} if kind is ChatRequest else {"prompt": "hello"}
    extra = dict.fromkeys(kind.IGNORED, "x") | dict.fromkeys([*kind.REFUSED, "n", "stop"])
    answer = client.post(path, json={**body, **extra, "max_tokens": 1})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "suffix": "", "max_tokens": 1}),
        ("/v1/responses", {"input": "hello", "top_logprobs": 0, "max_output_tokens": 1}),
    ],
)
def test_refused_fields_may_ask_for_nothing(client, path, body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_variables_that_the_template_never_reads_are_dropped_without_a_warning(client, path):
    # A warning would be an error here.
    body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False, "\n": 1}}
    assert client.post(path, json=body).status_code == 200


HOSTILE = {
    "deep": b'{"messages": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "deep in a free field": b'{"messages": [{"role": "user", "content": "a"}], '
    b'"tools": [{"type": "function", "function": {"name": "a", "parameters": {"a": '
    + b"[" * 400
    + b"]" * 400
    + b"}}}]}",
    "a long number": b'{"messages": [], "seed": ' + b"9" * 10_000 + b"}",
    "an infinite number": b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    "not a number": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "a surrogate as a name": b'{"\\ud800": 1}',
    "a surrogate to stop at": b'{"messages": [{"role": "user", "content": "a"}], "stop": "\\ud800"}',
    "no UTF-8": b'{"messages": "\xff"}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "nothing": b"",
    "a list": b"[]",
    "a number": b"1",
    "cut off": b'{"messages": [',
    "a long name": b'{"' + b"x" * 100_000 + b'": 1}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"])
def test_a_hostile_body_is_refused(client, path, body):
    assert len(refused(client, path, body)["message"]) < 500


def many(item):
    """Returns about a megabyte of JSON: a list that repeats the item."""
    return [item] * (1_000_000 // (len(json.dumps(item)) + 2))


NAMES = {f"name-{index}": "1" for index in range(200_000)}
LARGE = {
    "messages": (CHAT, {"messages": many({})}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": many({})}]}),
    "unknown fields": (CHAT, {"messages": HELLO, **NAMES}),
    "unknown fields of a message": (CHAT, {"messages": [HELLO[0] | NAMES]}),
    "tools": (CHAT, {"messages": HELLO, "tools": many({})}),
    "stops": (CHAT, {"messages": HELLO, "stop": many(1)}),
    "stop ids": (CHAT, {"messages": HELLO, "stop_token_ids": many("a")}),
    "biases": (CHAT, {"messages": HELLO, "logit_bias": NAMES}),
    "ids": ("/v1/completions", {"prompt": many(-1)}),
    "lists of ids": ("/v1/completions", {"prompt": many([-1] * 9)}),
    "items": ("/v1/responses", {"input": many({})}),
    "parts of an item": ("/v1/responses", {"input": [{"role": "user", "content": many({})}]}),
    "metadata": ("/v1/responses", {"input": "hello", "metadata": dict.fromkeys(NAMES, 1)}),
    "messages to tokenize": ("/tokenize", {"messages": many({})}),
    "ids to detokenize": ("/detokenize", {"tokens": many(-1)}),
}


@pytest.mark.parametrize(("path", "body"), LARGE.values(), ids=LARGE)
def test_a_large_wrong_body_is_refused_at_once(large, path, body):
    # A complaint for each wrong item would take a minute, gigabytes, and the event loop.
    content = json.dumps(body)
    begun = time.process_time()
    assert refused(large, path, content)["param"]
    assert time.process_time() - begun < 1


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(client, llm):
    length = llm.config.context_length
    prompt = [5] * (length + 10)
    error = refused(client, "/v1/completions", {"prompt": prompt})
    assert error["code"] == "context_length_exceeded"
    assert str(length) in error["message"]
    assert str(length + 10) in error["message"]
    long = [{"role": "user", "content": "x y " * length}]
    assert refused(client, CHAT, {"messages": long})["code"] == "context_length_exceeded"
    assert is_idle(llm)


def test_other_statuses(client):
    assert refused(client, CHAT, {"messages": HELLO, "model": "other"}, 404)["code"] == "model_not_found"
    assert client.get("/nothing").json()["error"]["code"] == "not_found"
    assert client.get(CHAT).status_code == 405
    assert client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 400
    assert client.post(CHAT, content=b"{}").status_code == 400


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_head_is_get_without_a_body(client, path):
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert client.head("/v1/models/other").status_code == 404


def test_the_description_has_no_head(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert not any("head" in methods for methods in paths.values())
    assert client.head(CHAT).status_code == 405


def test_a_compressed_body_is_refused(client):
    body = json.dumps({"messages": HELLO, "max_tokens": 1}).encode()
    compressed = JSON | {"Content-Encoding": "gzip"}
    answer = client.post(CHAT, content=gzip.compress(body), headers=compressed)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (415, "Content-Encoding")
    assert (error["code"], "gzip" in error["message"]) == ("unsupported_media_type", True)
    answer = client.post(CHAT, content=body, headers=JSON | {"Content-Encoding": "Identity"})
    assert answer.status_code == 200


def test_a_large_body_is_refused(client):
    assert refused(client, CHAT, b" " * 200_001, 413)["code"] == "request_too_large"
    answer = client.post(CHAT, content=(b" " * 1000 for _ in range(300)), headers=JSON)
    assert answer.status_code == 413
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_still_sends_gets_the_answer(server, chunked):
    parts = [b" " * 3000] * 100
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {sum(map(len, parts))}"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(head.encode())
        for part in parts:
            connection.sendall(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            time.sleep(0.001)
        connection.sendall(b"0\r\n\r\n" if chunked else b"")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_waits_for_permission_need_not_send(server):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: 300000\r\nExpect: 100-continue\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_there_is_no_cors(client):
    answer = client.options(CHAT, headers={"Origin": "http://a", "Access-Control-Request-Method": "POST"})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_other_host_names_are_refused(llm):
    with running(llm, allowed_hosts=("localhost", "::1", "My.Host")) as server, server.client() as client:
        for host in ("localhost", "LOCALHOST:80", "[::1]", "[::1]:8000", "my.host:1"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "[::2]", "a@localhost"):
            # As a browser does it for a page whose name points to the server.
            headers = JSON | {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
            answer = client.post(CHAT, json={"messages": HELLO}, headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (403, "Host")
            assert "API key" in error["message"]
            assert "--host" in error["message"]


def test_a_full_queue_is_status_429(server, client, llm):
    body = {"messages": HELLO, "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 8}
    with client.stream("POST", CHAT, json=body) as first:
        assert first.status_code == 200
        error = refused(client, CHAT, {"messages": HELLO}, 429)
        assert error["code"] == "rate_limit_exceeded"
        again = client.post(CHAT, json={"messages": HELLO})
        assert int(again.headers["retry-after"]) > 0
    until(lambda: server.state.queue.length == 0 and is_idle(llm))
    assert client.post(CHAT, json={"messages": HELLO, "max_tokens": 1}).status_code == 200


def test_the_key_is_needed_everywhere_but_for_health(llm):
    with running(llm, api_key="sécret", max_prompt_tokens=5) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            for path in ("/v1/models", "/metrics", "/docs", "/nothing"):
                answer = client.get(path, headers=header)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": b"Bearer " + "sécret".encode()}
        assert client.get("/v1/models", headers=right).status_code == 200
        body = {"messages": HELLO}
        answer = client.post(CHAT, json=body, headers=right)
        assert answer.status_code == 400
        assert "accepts 5" in answer.json()["error"]["message"]


@pytest.mark.parametrize("key", ["secret\n", " secret\r\n", "\xa0secret "])
def test_white_space_around_the_key_does_not_count(llm, key):
    with TestClient(build_app(llm, api_key=key)) as client:
        given = {"Authorization": b"Bearer " + key.strip(" \r\n").encode()}
        assert client.get("/v1/models", headers=given).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": "Bearer "}).status_code == 401


def test_a_server_can_be_mounted(llm):
    app = FastAPI()
    app.mount("/llm", build_app(llm, api_key="k"))
    with TestClient(app) as client:
        assert client.get("/llm/health").status_code == 200
        assert client.get("/llm/v1/models").status_code == 401
        key = {"Authorization": "Bearer k"}
        assert client.get("/llm/v1/models", headers=key).status_code == 200
        assert 'path="/v1/models",status="401"' in client.get("/llm/metrics", headers=key).text


def test_the_client_raises_its_own_errors(server):
    with (
        server.openai_client() as client,
        pytest.raises(openai.BadRequestError, match="mood") as caught,
    ):
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"mood": 1})
    assert caught.value.param == "mood"


def test_a_model_that_has_failed_turns_health_red(tiny):
    with candle_llama.load(tiny) as llm, running(llm) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        server.state.note(candle_llama.InternalError("the engine has failed"))
        assert client.get("/health").status_code == 503
        assert client.post(CHAT, json={"messages": HELLO}).status_code == 503


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_a_closed_model_turns_health_red(tiny, path):
    prompt = {CHAT: "messages", "/v1/completions": "prompt"}.get(path, "input")
    body = {prompt: HELLO if path == CHAT else "hello"}
    app = FastAPI()
    with candle_llama.load(tiny) as llm:
        app.mount("/llm", build_app(llm))
        with TestClient(app) as client:
            assert client.get("/llm/health").status_code == 200
            llm.close()
            for answer in (client.get("/llm/health"), client.post("/llm" + path, json=body)):
                assert answer.status_code == 503
                error = answer.json()["error"]
                assert (error["message"], error["type"]) == ("the model is closed", "server_error")


@pytest.mark.parametrize("stream", [False, True])
def test_closing_the_model_ends_what_runs(demo, stream):
    body = {"messages": HELLO, "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    with candle_llama.load(demo) as llm, running(llm) as server, server.client() as client:

        def close():
            until(lambda: llm.metrics().tokens_out > 0)
            llm.close()

        closer = threading.Thread(target=close)
        closer.start()
        answer = client.post(CHAT, json=body)
        closer.join()
    assert answer.status_code == (200 if stream else 503)
    error = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
    assert error["error"]["code"] == "service_unavailable"


def test_metrics_of_the_server_outlive_the_model(tiny):
    with candle_llama.load(tiny) as llm, running(llm) as server, server.client() as client:
        assert "vllm:num_requests_running" in client.get("/metrics").text
        llm.close()
        answer = client.get("/metrics")
        assert answer.status_code == 200
        assert "vllm:e2e_request_latency_seconds" in answer.text
        assert "vllm:num_requests_running" not in answer.text


def test_a_model_without_a_tokenizer_cannot_be_served(tmp_path):
    folder = write_checkpoint(tmp_path / "model", tokenizer=False)
    with candle_llama.load(folder) as llm, pytest.raises(FileNotFoundError):
        build_app(llm)


@pytest.mark.parametrize("options", [{"api_key": " "}, {"max_queue": 0}, {"max_body_bytes": 1.5}])
def test_build_app_checks_its_options(llm, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build_app(llm, **options)
