"""The end of work: clients that disconnect, a server that stops, and the command `serve`."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from candle_llama.cli import one_line
from candle_llama.server import completions
from candle_llama.server.run import listen
from serving import CHAT, HELLO, is_idle, running, until

LONG = {"messages": HELLO, "max_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(demo_llm):
    """A model that takes seconds for a long answer; the tiny one is too fast to be interrupted."""
    return demo_llm


@pytest.fixture(scope="module")
def server(llm):
    with running(llm) as server:
        yield server


@pytest.mark.parametrize("extra", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}], ids=str)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_disconnect_stops_the_work(server, llm, path, extra):
    body = {**LONG, **extra}
    if path != CHAT:
        body["prompt"] = "hello"
        del body["messages"]
    before = llm.metrics()
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + data)
        until(lambda: llm.metrics().tokens_out > before.tokens_out)
    begun = time.monotonic()
    until(lambda: is_idle(llm) and server.state.queue.length == 0)
    assert time.monotonic() - begun < 1
    assert llm.metrics().tokens_out - before.tokens_out < 900 * body.get("n", 1)


def test_prompts_are_scored_one_at_a_time_also_after_a_disconnect(server, monkeypatch):
    now, most, calls = 0, 0, 0
    release = threading.Event()

    def slow(llm, ids, count, cancellation):
        nonlocal now, most, calls
        now, calls = now + 1, calls + 1
        most = max(most, now)
        assert release.wait(10)
        now -= 1
        return [(token, None, []) for token in ids]

    monkeypatch.setattr(completions, "score", slow)
    body = {"prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 0}
    for _ in range(2):
        with server.client() as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.5)
    threading.Timer(0.5, release.set).start()
    with server.client() as client:
        assert client.post("/v1/completions", json=body).status_code == 200
    # The second request was gone before its turn came.
    assert (most, calls) == (1, 2)


@pytest.mark.parametrize("count", [0, 1])
def test_a_disconnect_ends_the_scoring_of_a_prompt(server, llm, monkeypatch, count):
    # A prompt that takes minutes, were it not cancelled.
    ended = threading.Event()
    real = completions.score

    def endless(llm, ids, count, cancellation):
        try:
            while True:
                real(llm, ids, count, cancellation)
        finally:
            ended.set()

    monkeypatch.setattr(completions, "score", endless)
    body = {"prompt": "hello world " * 40, "echo": True, "logprobs": count, "max_tokens": 0}
    with server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.3)
    assert ended.wait(2)
    until(lambda: is_idle(llm))


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(server, llm):
    with server.client() as client, client.stream("POST", CHAT, json={**LONG, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.call(server.state.stop)
        events = [line.removeprefix("data: ") for line in lines if line]
    server.state.is_stopping = False
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "service_unavailable"
    until(lambda: is_idle(llm))


def test_a_server_that_stops_answers_what_it_does_not_stream(server, llm):
    def stop():
        until(lambda: llm.metrics().running == 1)
        server.call(server.state.stop)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with server.client() as client:
        answer = client.post(CHAT, json=LONG)
        stopper.join()
        refused = client.post(CHAT, json=LONG)
    server.state.is_stopping = False
    assert (answer.status_code, refused.status_code) == (503, 503)
    assert int(answer.headers["retry-after"]) > 0
    until(lambda: is_idle(llm))


@contextlib.contextmanager
def serve(*arguments, env=None):
    """Runs the command; yields the process and the URL that it prints."""
    with subprocess.Popen(
        [sys.executable, "-m", "candle_llama", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
    ) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_the_command_serves_until_ctrl_c(tiny):
    with serve(tiny, "--port", 0, "--served-model-name", "a", env={"CANDLE_LLAMA_API_KEY": "k"}) as (
        process,
        url,
    ):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert httpx.get(url + "/v1/models").status_code == 401
        models = httpx.get(url + "/v1/models", headers={"Authorization": "Bearer k"}).json()
        assert models["data"][0]["id"] == "a"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM for one process")
def test_streams_that_run_at_the_end_are_ended():
    with serve("demo", "--port", 0, "--grace-seconds", 0) as (process, url):
        # Long enough to be cut off: there is no grace period.
        body = {**LONG, "stream": True}
        with httpx.Client(timeout=30) as client, client.stream("POST", url + CHAT, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "service_unavailable"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_a_second_ctrl_c_ends_the_grace_period():
    with serve("demo", "--port", 0, "--grace-seconds", 60) as (process, url):
        body = {**LONG, "max_tokens": 8000, "stream": True}
        with httpx.Client(timeout=30) as client, client.stream("POST", url + CHAT, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            events = [line.removeprefix("data: ") for line in lines if line]
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "service_unavailable"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM for one process")
def test_streams_may_end_within_the_grace_period(tiny):
    with serve(tiny, "--port", 0) as (process, url):
        body = {**LONG, "max_tokens": 300, "stream": True}
        with httpx.Client(timeout=30) as client, client.stream("POST", url + CHAT, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"


def test_the_command_understands_old_and_new_clients(tiny):
    body = json.dumps({"messages": HELLO, "max_tokens": 3, "stream": True})
    common = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    # Java's HttpClient offers HTTP/2 with each first request.
    upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    answers = {}
    with serve(tiny, "--port", 0) as (_, url):
        host, port = url.removeprefix("http://").split(":")
        for version, headers in (("1.1", upgrade), ("1.0", "")):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(f"POST {CHAT} HTTP/{version}\r\n{common}{headers}\r\n{body}".encode())
                answer = b""
                while b"[DONE]" not in answer and (part := connection.recv(65536)):
                    answer += part
            answers[version] = answer.decode()
    for answer in answers.values():
        assert answer.startswith("HTTP/1.1 200 ")
        assert "data: [DONE]" in answer
    # HTTP/1.0 has no chunks.
    assert "transfer-encoding: chunked" in answers["1.1"].lower()
    assert "transfer-encoding" not in answers["1.0"].lower()


def test_the_command_reports_errors_in_one_line(command, tmp_path):
    found = command("serve", tmp_path / "missing", "--port", 0)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.count("\n") == 1
    assert "missing" in found.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = command("serve", "demo", "--port", port)
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert command("serve", "demo", "--port", "-1").returncode == 2


def test_a_host_that_is_not_known_is_named(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OSError, match="not known") as caught:
        listen("nosuchhost.invalid", 0)
    assert one_line(caught.value) == "nosuchhost.invalid: Name or service not known"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [((), 403), (("--host", "localhost"), 403), (("--host", "0.0.0.0"), 200), (("--api-key", "k"), 200)],
    ids=str,
)
def test_the_command_accepts_its_own_host_names(tiny, arguments, status):
    key = {"Authorization": "Bearer k"}
    with serve(tiny, "--port", 0, *arguments) as (_, url):
        assert httpx.get(url + "/v1/models", headers=key).status_code == 200
        found = httpx.get(url + "/v1/models", headers={"Host": "evil.example", **key})
        assert found.status_code == status


def test_the_command_warns_without_a_key_on_other_addresses(tiny):
    with serve(tiny, "--host", "0.0.0.0", "--port", 0) as (process, url):
        assert url.startswith("http://0.0.0.0:")
        process.kill()
        _, err = process.communicate(timeout=20)
    assert err.startswith("candle-llama: warning: everybody who reaches 0.0.0.0")
