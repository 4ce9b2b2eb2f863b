"""The server with the official openai client: chats, completions, streams, lists, log-probabilities."""

import asyncio
import inspect
import json
import statistics
import threading
import time

import openai
import pytest
from fastapi.testclient import TestClient
from openai.resources.chat.completions import Completions as ChatResource
from openai.resources.completions import Completions as CompletionResource
from openai.resources.responses import Responses as ResponsesResource

import candle_llama
from candle_llama.bench.synthetic import byte_alphabet
from candle_llama.server import build_app, chat
from candle_llama.server.schema import ChatRequest, CompletionRequest, ResponsesRequest
from serving import HELLO, is_idle, running, until
from test_answers import BYTES, PARIS, VOCABULARY, write_sentence_piece_json
from test_answers import IDS as PIECE_IDS
from tiny import BOS, SPECIAL_TOKENS, TOKEN_IDS, tiny_config, write_checkpoint

MODEL = "tiny"
SAMPLED = {"temperature": 1.0, "seed": 7, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, served_model_name=MODEL) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with server.openai_client() as client:
        yield client


def create(client, **options):
    return client.chat.completions.create(model=MODEL, messages=HELLO, **{**SAMPLED, **options})


def test_a_chat_gives_the_answer_of_the_model(client, llm):
    answer = create(client)
    expected = llm.chat(HELLO, temperature=1.0, seed=7, max_tokens=12)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == MODEL


def test_a_streamed_chat_gives_the_same_text(client):
    whole = create(client)
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_response_does_not_wait_for_an_acknowledgement(server):
    # Of its head, which clients send 40 ms later.
    times = []
    with server.client() as client:
        for _ in range(20):
            begun = time.monotonic()
            assert client.get("/health").status_code == 200
            times.append(time.monotonic() - begun)
    assert statistics.median(times) < 0.03


def test_events_of_a_fast_model_are_few(client):
    # The tiny model makes a token in far less than the 8 ms between two events.
    given = {"max_tokens": 200, "extra_body": {"ignore_eos": True}, "logprobs": True}
    begun = time.monotonic()
    chunks = list(create(client, stream=True, **given))
    # One for each 16 ms, and those of the role, the first token and the end.
    most = (time.monotonic() - begun) / 0.016 + 5
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert len(chunks) <= most < 200
    assert sum(len(piece.content) for piece in pieces if piece) == 200


def test_without_include_usage_a_stream_has_none(client):
    assert all(chunk.usage is None and chunk.choices for chunk in create(client, stream=True))


def test_n_answers_have_seeds_of_their_own(client):
    answer = create(client, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [create(client, seed=7 + index) for index in range(3)]
    assert [one.message.content for one in answer.choices] == [
        one.choices[0].message.content for one in alone
    ]
    assert answer.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    texts = ["", "", ""]
    for chunk in create(client, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [one.message.content for one in answer.choices]


def test_a_repeated_prompt_is_cached(client):
    messages = [{"role": "user", "content": "and the world " * 30}]
    first, second = (
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2) for _ in range(2)
    )
    assert first.usage.prompt_tokens > 64
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 64
    salted = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=2, extra_body={"cache_salt": "mine"}
    )
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_log_probabilities_of_a_chat(client, llm):
    answer = create(client, logprobs=True, top_logprobs=3)
    expected = llm.chat(HELLO, temperature=1.0, seed=7, max_tokens=12, logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == [entry.logprob for entry in expected.logprobs]
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert all(e.bytes == list(e.token.encode()) for e in entries if "\ufffd" not in e.token)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == expected.text
    streamed = [
        entry
        for chunk in create(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in entries]


def test_the_extensions_reach_the_engine(client, llm):
    given = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "ignore_eos": True, "min_tokens": 4}
    answer = create(client, extra_body={**given, "stop_token_ids": [1]}, logit_bias={"40": 5}, stop=["zz"])
    del given["min_tokens"]
    expected = llm.chat(
        HELLO,
        **given,
        temperature=1.0,
        seed=7,
        max_tokens=12,
        min_new_tokens=4,
        stop_token_ids=[1],
        logit_bias={40: 5},
        stop="zz",
    )
    assert answer.choices[0].message.content == expected.text


@pytest.mark.parametrize("prompt", ["hello", [1, 2, 3], ["hello", "the world"], [[1, 2], [3]]])
def test_completions_take_texts_token_ids_and_lists(client, llm, prompt):
    answer = client.completions.create(model=MODEL, prompt=prompt, **SAMPLED)
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    expected = llm.generate([prompt] if single else prompt, temperature=1.0, seed=7, max_tokens=12)
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    assert answer.usage.prompt_tokens == sum(one.prompt_tokens for one in expected)
    texts = [""] * len(expected)
    for chunk in client.completions.create(model=MODEL, prompt=prompt, stream=True, **SAMPLED):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [one.text for one in expected]


def test_a_completion_has_16_tokens_by_default(client):
    answer = client.completions.create(model=MODEL, prompt="hello", extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_echo_repeats_the_prompt_with_its_log_probabilities(client, llm):
    options = {"model": MODEL, "prompt": "hello world", "echo": True, "logprobs": 2, "max_tokens": 3}
    answer = client.completions.create(**options)
    choice, form = answer.choices[0], answer.choices[0].logprobs
    expected = llm.generate("hello world", max_tokens=3)
    assert choice.text == "hello world" + expected.text
    ids = [*llm.tokenizer.encode("hello world"), *expected.token_ids]
    assert len(form.tokens) == len(form.token_logprobs) == len(form.top_logprobs) == len(ids)
    scored = llm.score(llm.tokenizer.encode("hello world"))
    assert form.token_logprobs[0] is None
    assert form.token_logprobs[1 : len(scored.logprobs)] == pytest.approx(scored.logprobs[1:], abs=1e-5)
    tops, values = form.top_logprobs[1:], form.token_logprobs[1:]
    assert all(max(top.values()) >= one for top, one in zip(tops, values, strict=True))
    streamed = list(client.completions.create(stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
    offsets = [offset for chunk in streamed for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == form.text_offset


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A model whose tokenizer puts a space before every text and removes it again, as Llama 2's does."""
    config = tiny_config(vocab_size=len(VOCABULARY), bos_token_id=1, eos_token_id=2)
    folder = write_checkpoint(tmp_path_factory.mktemp("spaced") / "m", config, tokenizer=False)
    (folder / "generation_config.json").unlink()
    write_sentence_piece_json(folder)
    with candle_llama.load(folder) as llm:
        yield llm


BYTE_LEVEL = ["hello world", "Café, naïve 你好 hello", "a 😀 b", "<|end|> the<|begin|> and", ""]
EMOJI = "a 😀 and".encode()
PROMPTS = [
    *(("llm", prompt) for prompt in BYTE_LEVEL),
    *(("llm", [BOS, *(TOKEN_IDS[byte_alphabet()[one]] for one in EMOJI[:length])]) for length in (10, 4)),
    *(("spaced", prompt) for prompt in ("Paris is the é Lyon", " Paris", "<s>Paris</s>is the", "")),
    *(("spaced", prompt) for prompt in ([1, PIECE_IDS["<0xC3>"], PARIS, PARIS], [PARIS, PARIS], [1])),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(("model", "prompt"), PROMPTS, ids=lambda value: str(value)[:24])
def test_tokens_begin_at_their_offsets(request, model, prompt, echo, stream):
    # Some of the answer's tokens are special, others are parts of characters.
    sampling = {"temperature": 1.5, "seed": 5, "ignore_eos": True, "max_tokens": 40, "logprobs": 1}
    if model == "spaced":
        sampling["logit_bias"] = {str(token): -100 for token, name in enumerate(VOCABULARY) if name in BYTES}
    llm = request.getfixturevalue(model)
    http = TestClient(build_app(llm))
    body = {"prompt": prompt, "echo": echo, "stream": stream, **sampling}
    answer = http.post("/v1/completions", json=body)
    if stream:
        events = [json.loads(line[6:])["choices"][0] for line in answer.text.split("\n\n")[:-2]]
    else:
        events = answer.json()["choices"]
    text = "".join(event["text"] for event in events)
    tokens = [token for event in events for token in event["logprobs"]["tokens"]]
    offsets = [offset for event in events for offset in event["logprobs"]["text_offset"]]
    ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    assert len(tokens) == len(offsets) == 40 + (len(ids) if echo else 0)
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(text)
    special = {*SPECIAL_TOKENS, *VOCABULARY[:3]}
    checked = 0
    for token, offset in zip(tokens, offsets, strict=True):
        if "\ufffd" in token or (token in special and not text.startswith(token, offset)):
            continue
        # The first space of a text may be missing, also behind a special token.
        is_first = text[:offset].endswith(("<s>", "</s>")) or offset == 0
        expected = (token, token.removeprefix(" ")) if is_first else token
        assert text.startswith(expected, offset), (token, offset)
        checked += 1
    assert checked > 5


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        # The tokenizer has added BOS, which the text does not show.
        ("hello", {"<|begin|>": 0, "hello": 0}),
        ("a<|end|>b", {"<|begin|>": 0, "a": 0, "<|end|>": 1, "b": 8}),
        ([BOS, TOKEN_IDS["hello"]], {"<|begin|>": 0, "hello": 9}),
    ],
)
def test_an_echo_shows_the_special_tokens_that_the_client_has_sent(client, prompt, tokens):
    answer = client.completions.create(model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    form = answer.choices[0].logprobs
    assert dict(zip(form.tokens, form.text_offset, strict=True)) == tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_can_be_scored_without_an_answer(client, stream):
    # As lm-eval's harness asks for log-likelihoods.
    answer = client.completions.create(
        model=MODEL, prompt=[[5, 6, 7], [8, 9]], echo=True, logprobs=1, max_tokens=0, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert [len(choice.logprobs.token_logprobs) for choice in choices] == [3, 2]
    assert [choice.finish_reason for choice in choices] == ["length", "length"]
    if not stream:
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 0)


def test_the_async_client_runs_requests_together(server, llm):
    async def main():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:

            async def one(seed):
                answer = await create(client, seed=seed)
                return answer.choices[0].message.content

            async def streamed(seed):
                stream = await create(client, seed=seed, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, range(8)), *map(streamed, range(8)))

    answers = asyncio.run(main())
    expected = [llm.chat(HELLO, temperature=1.0, seed=seed, max_tokens=12).text for seed in range(8)]
    assert answers == expected * 2
    until(lambda: is_idle(llm))


@pytest.mark.parametrize("n", [1, 32])
def test_a_long_prompt_with_several_answers_is_read_in_a_thread(client, monkeypatch, n):
    threads = []

    def begin(self, begin=chat.Answers.begin):
        threads.append(threading.current_thread().name)
        return begin(self)

    monkeypatch.setattr(chat.Answers, "begin", begin)
    messages = [{"role": "user", "content": "the " * 200}]
    client.chat.completions.create(model=MODEL, messages=messages, n=n, max_tokens=1)
    assert threads[0].startswith("asyncio") == (n > 1)


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "candle-llama"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_parts_and_the_developer_role(client, llm):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hel\nlo"}]
    assert answer.choices[0].message.content == llm.chat(turns, max_tokens=5).text


def test_hints_in_parts_are_ignored_and_a_refusal_is_text(client, llm):
    hints = {"prompt_cache_breakpoint": {"mode": "explicit"}, "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hello", **hints}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        *HELLO,
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    turns = [*HELLO, {"role": "assistant", "content": "no"}, *HELLO]
    assert answer.choices[0].message.content == llm.chat(turns, max_tokens=5).text


def test_an_answer_can_be_sent_back(client):
    answer = create(client)
    messages = [*HELLO, answer.choices[0].message, {"role": "user", "content": "and"}]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3).choices


@pytest.mark.parametrize(
    ("resource", "kind"),
    [
        (ChatResource, ChatRequest),
        (CompletionResource, CompletionRequest),
        (ResponsesResource, ResponsesRequest),
    ],
)
def test_every_field_of_the_client_is_known(resource, kind):
    ours = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    fields = set(inspect.signature(resource.create).parameters) - ours
    known = [*kind.model_fields, *kind.IGNORED, *kind.REFUSED]
    assert fields <= set(known)
    assert len(known) == len(set(known))


def test_tokens_and_texts(server, llm):
    with server.client() as client:
        ids = client.post("/tokenize", json={"prompt": "hello world"}).json()
        assert ids["count"] == len(ids["tokens"])
        assert ids["max_model_len"] > 0
        chat = client.post("/tokenize", json={"messages": HELLO}).json()
        assert chat["count"] > ids["count"]
        text = client.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"]
        assert text.endswith("hello world")
        info = client.get("/tokenizer_info").json()
        assert (info["bos_token"], info["eos_token"]) == ("<|begin|>", "<|end|>")
        assert info["chat_template"] == llm.tokenizer.chat_template


def test_metrics_and_health(server, client):
    create(client)
    with server.client() as http:
        assert http.get("/health").json() == {"status": "ok"}
        text = http.get("/metrics").text
    for name in ("num_requests_running", "prompt_tokens_total", "time_to_first_token_seconds_bucket"):
        assert f"vllm:{name}{{" in text
    assert f'model_name="{MODEL}"' in text


def test_the_description_has_every_request(server):
    with server.client() as client:
        description = client.get("/openapi.json").json()
    schema = description["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    name = schema["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
    assert set(description["components"]["schemas"][name]["properties"]) == set(ChatRequest.model_fields)
    responses = description["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert responses["200"]["content"]["application/json"]["schema"]["type"] == "object"
    assert "default" in responses
