"""Ray Data and Ray Serve, on a local Ray of two CPUs."""

import contextlib
import os
import signal
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

# Importing Serve warns of its own use of pydantic.
with warnings.catch_warnings(action="ignore"):
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")

import candle_llama
from candle_llama import InternalError, SamplingParams
from candle_llama.integrations import ray_data, ray_serve
from candle_llama.integrations.ray_data import LlamaBatch
from candle_llama.server import build_app

pytestmark = pytest.mark.filterwarnings("default")

PARAMS = SamplingParams(max_new_tokens=12)
PROMPTS = [f"Number {index} on the list of {index % 7} things is" for index in range(200)]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!", "name": "Ann"}],
]


def column(values: list[Any]) -> np.ndarray:
    """A column of Python objects, as batches have it."""
    found = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        found[index] = value
    return found


def processes() -> dict[int, str]:
    """The processes that this one has started, and theirs, by id: the name of each."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, OSError):
            pid = int(entry.name)
            before, _, after = (entry / "stat").read_text().rpartition(")")
            if after.split()[0] != "Z":
                names[pid], parents[pid] = before.partition("(")[2], int(after.split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found - {os.getpid()}}


@pytest.fixture(scope="module")
def cluster():
    """A local Ray, which leaves no process behind."""
    before = processes()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        yield
    finally:
        started = processes().keys() - before.keys()
        ray.shutdown()
        end = time.monotonic() + 20
        while left := [pid for pid in started if Path(f"/proc/{pid}").exists() and pid in processes()]:
            assert time.monotonic() < end, left
            time.sleep(0.1)
        assert started


@pytest.fixture(scope="module")
def answer(tiny):
    return LlamaBatch(tiny, params=SamplingParams(max_new_tokens=4, logprobs=2), return_exceptions=True)


def run(items: list[dict[str, Any]], cls: type, actors: int, batch_size: int, **options: Any) -> list[Any]:
    """Maps a dataset over actors with one CPU each; returns its rows."""
    dataset = ray.data.from_items(items, override_num_blocks=8).map_batches(
        cls,
        fn_constructor_kwargs=options,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        batch_size=batch_size,
    )
    return dataset.take_all()


# --- LlamaBatch, without a cluster ---


def test_prompts_are_texts_or_token_ids(answer, llm):
    prompts = ["hello world", llm.tokenizer.encode("hello"), np.array([5, 6, 7])]
    found = answer({"id": np.arange(3), "prompt": column(prompts)})
    outs = llm.generate(prompts, max_new_tokens=4, logprobs=2)
    assert list(found) == [
        *("id", "prompt", "text", "token_ids", "finish_reason", "prompt_tokens", "logprobs", "error")
    ]
    assert found["id"].tolist() == [0, 1, 2]
    for name in ("text", "token_ids", "finish_reason", "prompt_tokens"):
        assert list(found[name]) == [getattr(out, name) for out in outs]
    for tokens, out in zip(found["logprobs"], outs, strict=True):
        assert [token["token_id"] for token in tokens] == out.token_ids
        assert [token["logprob"] for token in tokens] == [token.logprob for token in out.logprobs]
        assert [[(top["token_id"], top["logprob"]) for top in token["top"]] for token in tokens] == [
            token.top for token in out.logprobs
        ]
    assert list(found["error"]) == [None] * 3


def test_a_rows_error_is_a_column(answer, llm):
    long = "hello " * 5000
    found = answer({"prompt": column(["hello", long, None, [10**6]])})
    assert found["text"][0] == llm.generate("hello", max_new_tokens=4).text
    classes = [text and text.partition(":")[0] for text in found["error"]]
    assert classes == [None, "ContextLengthError", "TypeError", "ValueError"]
    for name in ("text", "token_ids", "finish_reason", "prompt_tokens", "logprobs"):
        assert [value is None for value in found[name]] == [False, True, True, True]


def test_a_column_of_numbers_is_no_prompt(answer):
    found = answer({"prompt": np.array([1, 2, 3])})
    assert [text.partition(":")[0] for text in found["error"]] == ["TypeError"] * 3


def test_an_empty_batch_stays_empty(answer):
    assert {name: len(values) for name, values in answer({"prompt": column([])}).items()}["text"] == 0


def test_the_first_error_is_raised_without_return_exceptions(tiny):
    answer = LlamaBatch(tiny, prompt_column="question", params=SamplingParams(max_new_tokens=4))
    assert "error" not in answer({"question": column(["hello"])})
    with pytest.raises(candle_llama.ContextLengthError):
        answer({"question": column(["hello", "hello " * 5000, None])})


def test_a_failed_engine_is_no_error_of_a_row(answer, monkeypatch):
    monkeypatch.setattr(answer, "_answer", lambda prompts: [InternalError("broken")])
    with pytest.raises(InternalError, match="broken"):
        answer({"prompt": column(["hello"])})


def test_conversations_are_answered_as_chat_does(tiny, llm):
    # As Arrow gives them: arrays for lists, and the keys of other rows.
    rows = [column([message | {"name": message.get("name")} for message in chat]) for chat in CHATS]
    template = "{{ messages | tojson }}{{ tools | tojson }}{{ mood }}"
    options = {
        "chat_template": template,
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        "template_variables": {"mood": "merry"},
    }
    answer = LlamaBatch(
        tiny,
        messages_column="chat",
        params=SamplingParams(max_new_tokens=4),
        chat_options=options,
        return_exceptions=True,
        output_prefix="answer_",
    )
    found = answer({"chat": column([*rows, None]), "text": np.arange(3)})
    for index, chat in enumerate(CHATS):
        out = llm.chat(chat, max_new_tokens=4, **options)
        assert found["answer_prompt_tokens"][index] == out.prompt_tokens
        assert found["answer_token_ids"][index] == out.token_ids
        assert found["answer_text"][index] == out.text
    assert found["answer_error"][2].startswith("TypeError")
    assert found["text"].tolist() == [0, 1, 2]


def test_wrong_columns_and_options_are_errors(answer, tiny):
    with pytest.raises(KeyError, match="no column 'prompt'; its columns are question"):
        answer({"question": column(["hello"])})
    with pytest.raises(ValueError, match="already has a column 'text'"):
        answer({"prompt": column(["hello"]), "text": column(["hello"])})
    with pytest.raises(TypeError, match="either prompts or messages"):
        LlamaBatch(tiny, prompt_column="a", messages_column="b")
    with pytest.raises(TypeError, match="give messages_column"):
        LlamaBatch(tiny, chat_options={"tools": []})
    with pytest.raises(TypeError, match=r"chat_options.*'tool'"):
        LlamaBatch(tiny, messages_column="chat", chat_options={"tool": []})
    with pytest.raises(TypeError, match="did you mean 'threads'"):
        LlamaBatch(tiny, load_options={"thread": 1})


# --- LlamaBatch, in actors ---


def test_two_actors_give_the_local_answers(cluster, demo, demo_llm):
    class Observed(LlamaBatch):
        def __call__(self, batch: ray_data.Batch) -> ray_data.Batch:
            found = super().__call__(batch)
            rows = len(found["text"])
            return {
                **found,
                "pid": np.full(rows, os.getpid()),
                "threads": np.full(rows, self.llm.load_report.threads),
            }

    items = [{"id": index, "prompt": prompt} for index, prompt in enumerate(PROMPTS)]
    rows = run(items, Observed, actors=2, batch_size=25, source=str(demo), params=PARAMS)
    found = {row["id"]: row for row in rows}
    assert len(rows) == len(found) == len(PROMPTS)
    for index, out in enumerate(demo_llm.generate(PROMPTS, PARAMS)):
        row = found[index]
        assert row["token_ids"] == out.token_ids
        assert (row["text"], row["finish_reason"]) == (out.text, out.finish_reason)
        assert (row["prompt"], row["prompt_tokens"]) == (PROMPTS[index], out.prompt_tokens)
    assert len({row["pid"] for row in rows}) == 2
    assert {row["threads"] for row in rows} == {1}


def test_the_rows_of_a_killed_actor_are_answered_once(cluster, demo, demo_llm, tmp_path):
    mark = tmp_path / "killed"

    class Killed(LlamaBatch):
        batches = 0

        def __call__(self, batch: ray_data.Batch) -> ray_data.Batch:
            found = super().__call__(batch)
            self.batches += 1
            if self.batches == 2:
                # The first actor that comes here dies with its answers.
                with contextlib.suppress(FileExistsError):
                    mark.touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
            return {**found, "pid": np.full(len(found["text"]), os.getpid())}

    items = [{"id": index, "prompt": prompt} for index, prompt in enumerate(PROMPTS[:64])]
    rows = run(items, Killed, actors=2, batch_size=4, source=str(demo), params=PARAMS)
    assert mark.exists()
    assert sorted(row["id"] for row in rows) == list(range(64))
    outs = demo_llm.generate(PROMPTS[:64], PARAMS)
    assert all(row["token_ids"] == outs[row["id"]].token_ids for row in rows)
    assert all(row["text"] == outs[row["id"]].text for row in rows)


def test_arrow_keeps_conversations_and_token_ids(cluster, demo, demo_llm):
    # Prompts of equal length become a tensor; a message's missing key becomes None.
    ids = [demo_llm.tokenizer.encode(text) for text in ("The capital of France is", "The opposite of hot is")]
    assert len({len(prompt) for prompt in ids}) == 1
    items = [{"ids": prompt, "chat": chat} for prompt, chat in zip(ids, CHATS, strict=True)]
    rows = run(items, LlamaBatch, 1, 2, source=str(demo), params=PARAMS, prompt_column="ids")
    outs = demo_llm.generate(ids, PARAMS)
    assert sorted(row["token_ids"] for row in rows) == sorted(out.token_ids for out in outs)
    rows = run(items, LlamaBatch, 1, 2, source=str(demo), params=PARAMS, messages_column="chat")
    chats = [demo_llm.chat(chat, PARAMS) for chat in CHATS]
    assert sorted(row["token_ids"] for row in rows) == sorted(out.token_ids for out in chats)
    assert sorted(row["text"] for row in rows) == sorted(out.text for out in chats)


# --- Ray Serve ---


@pytest.fixture(scope="module")
def endpoint(cluster, demo):
    """The URL of two replicas."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    two = ray_serve.deployment(
        str(demo),
        num_replicas=2,
        load_options={"max_num_seqs": 8},
        server_options={"served_model_name": "smol", "api_key": "secret"},
    )
    serve.run(two.bind(), name="llama")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def counts(url: str, name: str) -> set[float]:
    """The values of a count that the replicas have: each request for them goes to one of the two."""
    found = set()
    with httpx.Client(headers={"Authorization": "Bearer secret"}, timeout=10) as client:
        for _ in range(30):
            lines = client.get(f"{url}/metrics").text.splitlines()
            found.add(sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{")))
    return found


def test_the_openai_client_is_answered_by_two_replicas(endpoint, demo_llm):
    client = openai.OpenAI(base_url=f"{endpoint}/v1", api_key="secret", max_retries=0, timeout=60)

    def ask(index: int) -> str:
        messages = [{"role": "user", "content": PROMPTS[index]}]
        given = {"model": "smol", "messages": messages, "max_tokens": 12}
        if index % 2:
            return client.chat.completions.create(**given).choices[0].message.content
        chunks = client.chat.completions.create(**given, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    # An odd number, so that the replicas' counts differ.
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(25)))
    for index, text in enumerate(texts):
        assert text == demo_llm.chat([{"role": "user", "content": PROMPTS[index]}], PARAMS).text
    answered = counts(endpoint, "vllm:request_success_total")
    assert len(answered) == 2
    assert min(answered) > 0
    assert sum(answered) == 25


def test_errors_and_the_key_are_the_servers(endpoint):
    client = openai.OpenAI(base_url=f"{endpoint}/v1", api_key="wrong", max_retries=0, timeout=60)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    client = openai.OpenAI(base_url=f"{endpoint}/v1", api_key="secret", max_retries=0, timeout=60)
    with pytest.raises(openai.BadRequestError, match="the context holds"):
        client.completions.create(model="smol", prompt="hello " * 9000)
    assert [model.id for model in client.models.list()] == ["smol"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_stops_the_work(endpoint, stream):
    body = {"prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": stream}
    headers = {"Authorization": "Bearer secret"}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{endpoint}/v1/completions", json=body, headers=headers, timeout=1) as response,
    ):
        next(response.iter_lines())
    end = time.monotonic() + 10
    while counts(endpoint, "vllm:num_requests_running") != {0.0}:
        assert time.monotonic() < end


def test_a_replica_is_unhealthy_if_its_engine_has_failed(tiny):
    replica = ray_serve._Replica()
    replica.app = build_app(candle_llama.load(tiny))
    replica.check_health()
    replica.app.state.server.is_dead = True
    with pytest.raises(candle_llama.CandleLlamaError, match="the model has failed"):
        replica.check_health()


def test_replicas_follow_the_load_unless_their_number_is_given():
    def config(**options: Any) -> Any:
        return ray_serve.deployment("demo", **options)._deployment_config

    scaling = config().autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 100, 16)
    scaling = config(num_replicas="auto", autoscaling_config={"max_replicas": 4}).autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 16)
    fixed = config(num_replicas=3, max_ongoing_requests=20)
    assert (fixed.num_replicas, fixed.autoscaling_config, fixed.max_ongoing_requests) == (3, None, 20)
    assert config().max_ongoing_requests == 64
    with pytest.raises(TypeError):
        config(replicas=2)
