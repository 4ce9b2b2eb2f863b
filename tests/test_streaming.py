"""Streams give exactly the text of `generate`, piece by piece."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny as checkpoints
from candle_llama import Chunk

# With this bias only printable ASCII is generated, in tokens of one to several characters.
ASCII = {
    token_id: 100.0
    for token, token_id in checkpoints.TOKEN_IDS.items()
    if token.removeprefix("Ġ").isascii() and token not in checkpoints.SPECIAL_TOKENS and token != "Ġ"
}
# With this bias only pieces of a few multi-byte characters are generated, both complete and broken ones.
PIECES = dict.fromkeys(
    (checkpoints.TOKEN_IDS[piece] for piece in ("Ã", "©", "Ã©", "ð", "Ł", "ðŁ", "ĺ", "Ģ")), 100.0
)

prompts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
biases = st.sampled_from([{}, ASCII, PIECES])


def test_chunks_hold_the_same_data_as_the_completion(llm):
    whole = llm.generate("hello", max_new_tokens=20, ignore_eos=True, logprobs=1)
    chunks = list(llm.stream("hello", max_new_tokens=20, ignore_eos=True, logprobs=1))
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [entry for chunk in chunks for entry in chunk.logprobs] == whole.logprobs
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert [chunk.stats for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].stats.completion_tokens == 20


@given(prompt=prompts, seed=st.integers(0, 2**64 - 1), bias=biases)
def test_joined_chunks_equal_the_whole(llm, prompt, seed, bias):
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": seed, "logit_bias": bias, "ignore_eos": True}
    whole = llm.generate(prompt, **options)
    chunks = list(llm.stream(prompt, **options))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert whole.text == llm.tokenizer.decode(whole.token_ids)


@given(seed=st.integers(0, 1000), start=st.integers(0, 30), length=st.integers(1, 6), keep=st.booleans())
def test_stop_strings_that_span_tokens_never_appear(llm, seed, start, length, keep):
    options = {
        "max_new_tokens": 40,
        "temperature": 1.0,
        "seed": seed,
        "logit_bias": ASCII,
        "ignore_eos": True,
    }
    free = llm.generate("the", **options).text
    stop = free[start : start + length]
    options |= {"stop": [stop, "not in there: \N{SNOWMAN}"], "include_stop_str": keep}
    end = free.index(stop) + (len(stop) if keep else 0)
    whole = llm.generate("the", **options)
    assert (whole.text, whole.finish_reason, whole.stop_reason) == (free[:end], "stop", stop)
    chunks = list(llm.stream("the", **options))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert chunks[-1].finish_reason == "stop"


def test_a_stop_string_is_a_str_or_a_list(llm):
    options = {"max_new_tokens": 40, "logit_bias": ASCII, "ignore_eos": True}
    free = llm.generate("the", **options).text
    assert (
        llm.generate("the", stop=free[5:8], **options).text
        == llm.generate("the", stop=[free[5:8]], **options).text
    )


def test_the_beginning_of_a_stop_string_at_the_end_is_not_lost(llm):
    options = {"max_new_tokens": 10, "logit_bias": ASCII, "ignore_eos": True}
    free = llm.generate("the", **options).text
    stop = free[-1] + "\N{SNOWMAN}"
    assert "".join(chunk.text for chunk in llm.stream("the", stop=stop, **options)) == free


def test_stream_chat_equals_chat(llm):
    messages = [{"role": "user", "content": "hello"}]
    whole = llm.chat(messages, max_new_tokens=12)
    assert "".join(chunk.text for chunk in llm.stream_chat(messages, max_new_tokens=12)) == whole.text


def test_bad_arguments_fail_when_the_stream_is_created(llm):
    with pytest.raises(TypeError, match="did you mean"):
        llm.stream("the", max_new_token=3)
    with pytest.raises(TypeError, match="one prompt"):
        llm.stream(["the", "other"])


def test_text_arrives_while_it_is_generated(demo_llm):
    start = time.monotonic()
    times = [
        time.monotonic() - start
        for _ in demo_llm.stream("Once upon a time", max_new_tokens=30, ignore_eos=True)
    ]
    assert times[0] < times[-1] / 2
