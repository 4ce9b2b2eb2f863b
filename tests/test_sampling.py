"""The sampling parameters through the whole stack: distributions, seeds, extremes, and `SamplingParams`."""

import copy
import math
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama import SamplingParams

SAMPLED = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True}


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def first_tokens(llm, count, **options):
    """The first tokens of completions with the seeds 0, 1, 2, ..."""
    prompt = llm.tokenizer.encode("the")
    options = {"max_new_tokens": 1, "ignore_eos": True, "temperature": 1.0, **options}
    return [llm.generate(prompt, seed=seed, **options).token_ids[0] for seed in range(count)]


def bias_to(probabilities, llm):
    """A bias with which the first token after "the" has these probabilities by id; all other ids have 0."""
    logits = llm.logits(llm.tokenizer.encode("the"), last=1)[0].astype(np.float64)
    bias = dict.fromkeys(range(llm.config.vocab_size), -1000.0)
    return bias | {token: math.log(p) - logits[token] for token, p in probabilities.items()}


# Probabilities of the first token; the filtered distributions below are computed by hand.
FOUR = {10: 0.4, 20: 0.3, 30: 0.2, 40: 0.1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FOUR),
        ({"temperature": 0.5}, {10: 16 / 30, 20: 9 / 30, 30: 4 / 30, 40: 1 / 30}),
        ({"top_k": 3}, {10: 4 / 9, 20: 3 / 9, 30: 2 / 9}),
        ({"top_p": 0.65}, {10: 4 / 7, 20: 3 / 7}),
        ({"min_p": 0.45}, {10: 4 / 9, 20: 3 / 9, 30: 2 / 9}),
        ({"temperature": 0.5, "top_p": 0.5}, {10: 1.0}),
        ({"top_k": 2, "top_p": 0.6}, {10: 4 / 7, 20: 3 / 7}),
        ({"top_k": 3, "top_p": 0.4, "min_p": 0.1}, {10: 1.0}),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(llm, options, expected):
    count = 1500
    drawn = Counter(first_tokens(llm, count, logit_bias=bias_to(FOUR, llm), **options))
    assert drawn.keys() <= expected.keys()
    statistic = sum((drawn[token] - p * count) ** 2 / (p * count) for token, p in expected.items())
    # Chi-squared exceeds these bounds by chance with a probability of 0.001, for each number of degrees of
    # freedom. The seeds are fixed.
    assert statistic < {0: 1e-9, 1: 10.83, 2: 13.82, 3: 16.27}[len(expected) - 1]


def test_presence_and_frequency_count_the_output_and_repetition_the_prompt_too(llm):
    # A token of the prompt whose logit is negative, so that the repetition penalty multiplies it.
    logits = {token: llm.logits([checkpoints.BOS, token], last=1)[0] for token in range(10, 60)}
    token = min(logits, key=lambda token: logits[token][token])
    prompt, own = [checkpoints.BOS, token], float(logits[token][token])
    assert own < -0.1
    # With this bias its logit is 0.5 above that of token 5.
    bias = dict.fromkeys(range(llm.config.vocab_size), -1000.0)
    bias |= {token: 4.0 - own, 5: 3.5 - float(logits[token][5])}

    def first(**options):
        return llm.generate(prompt, max_new_tokens=1, logit_bias=bias, ignore_eos=True, **options).token_ids

    assert first() == [token]
    assert first(presence_penalty=2.0, frequency_penalty=2.0) == [token]
    # Penalties come before the bias: they multiply the model's own logit, not the biased one.
    assert first(repetition_penalty=1.0 - 0.4 / own) == [token]
    assert first(repetition_penalty=1.0 - 0.6 / own) == [5]


def test_penalties_count_occurrences_in_the_output(llm):
    # Without a penalty, token 10 is drawn every time; a frequency penalty lowers its logit each time.
    bias = dict.fromkeys(range(llm.config.vocab_size), -1000.0) | {10: 1000.0, 20: 999.0}
    options = {"max_new_tokens": 12, "logit_bias": bias, "ignore_eos": True}
    assert set(llm.generate("the", **options).token_ids) == {10}
    assert len(set(llm.generate("the", presence_penalty=2.0, **options).token_ids)) == 2
    frequent = llm.generate("the", frequency_penalty=2.0, **options).token_ids
    assert 4 <= Counter(frequent)[20] <= 6
    liked = llm.generate("the", presence_penalty=-2.0, **options).token_ids
    assert set(liked) == {10}


def test_a_seed_gives_the_same_tokens_in_every_kind_of_call(llm, tiny):
    expected = [llm.generate("the", seed=seed, **SAMPLED).token_ids for seed in range(6)]
    assert len({tuple(tokens) for tokens in expected}) == 6
    streamed = [
        [token for chunk in llm.stream("the", seed=seed, **SAMPLED) for token in chunk.token_ids]
        for seed in range(6)
    ]
    assert streamed == expected
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda seed: llm.generate("the", seed=seed, **SAMPLED).token_ids, range(6)))
    assert threaded == expected
    batch = llm.generate(["the", "the"], seed=3, **SAMPLED)
    assert [out.token_ids for out in batch] == [expected[3]] * 2
    with candle_llama.load(tiny, threads=1) as other:
        assert [other.generate("the", seed=seed, **SAMPLED).token_ids for seed in range(6)] == expected
    code = (
        "import sys, candle_llama; llm = candle_llama.load(sys.argv[1]); "
        f"print([llm.generate('the', seed=seed, **{SAMPLED!r}).token_ids for seed in range(6)])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)


def test_without_a_seed_answers_differ(llm):
    assert len({llm.generate("the", **SAMPLED).text for _ in range(5)}) > 1


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-30, 1e-10])
def test_a_tiny_temperature_is_greedy(llm, temperature):
    greedy = llm.generate("the", max_new_tokens=8, ignore_eos=True).token_ids
    options = {"max_new_tokens": 8, "ignore_eos": True, "seed": 1, "top_p": 0.9, "min_p": 0.1, "top_k": 9}
    assert llm.generate("the", temperature=temperature, **options).token_ids == greedy


@pytest.mark.parametrize("temperature", [1e10, 3e38])
def test_a_huge_temperature_draws_uniformly(llm, temperature):
    tokens = first_tokens(llm, 400, temperature=temperature)
    # 400 uniform draws from about 300 tokens give about 220 different ones.
    assert len(set(tokens)) > 150
    for filters in ({"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 5}):
        assert first_tokens(llm, 3, temperature=temperature, **filters)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-30, 3e38])
@pytest.mark.parametrize("bias", [3.4e38, -3.4e38])
@pytest.mark.parametrize("repetition_penalty", [1e-38, 1.0, 3e38])
def test_extremes_never_break_a_completion(llm, temperature, bias, repetition_penalty):
    out = llm.generate(
        "the",
        max_new_tokens=4,
        ignore_eos=True,
        seed=1,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        top_k=40,
        top_p=0.99,
        min_p=1e-30,
        logit_bias=dict.fromkeys(range(0, llm.config.vocab_size, 2), bias),
        logprobs=3,
    )
    assert len(out.token_ids) == 4
    assert all(math.isfinite(entry.logprob) for entry in out.logprobs)


def test_a_bias_of_minus_100_bans_and_an_infinite_one_is_refused(llm):
    greedy = llm.generate("the", max_new_tokens=1).token_ids[0]
    assert llm.generate("the", max_new_tokens=1, logit_bias={greedy: -100}).token_ids != [greedy]
    with pytest.raises(ValueError, match="logit_bias"):
        llm.generate("the", logit_bias={greedy: -math.inf})


def test_a_model_that_computes_nan_is_a_generation_error(tmp_path):
    folder = checkpoints.write_checkpoint(tmp_path / "model")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    # Make the last element of the last tensor NaN.
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with candle_llama.load(folder) as llm:
        for options in ({}, {"temperature": 1.0}, {"logprobs": 2}):
            with pytest.raises(candle_llama.GenerationError, match="NaN"):
                llm.generate("the", max_new_tokens=2, **options)
        with pytest.raises(candle_llama.GenerationError, match="NaN"):
            llm.score("the world")


def test_alternatives_are_sorted_and_sum_to_at_most_one(llm):
    vocab_size = llm.config.vocab_size
    out = llm.generate("the", max_new_tokens=3, logprobs=vocab_size, seed=1, temperature=1.0, ignore_eos=True)
    for entry in out.logprobs:
        logprobs = [logprob for _, logprob in entry.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert sorted(token for token, _ in entry.top) == list(range(vocab_size))
        assert sum(map(math.exp, logprobs)) == pytest.approx(1.0, abs=1e-5)
        assert dict(entry.top)[entry.token_id] == entry.logprob
    alone = llm.generate("the", max_new_tokens=3, logprobs=0, ignore_eos=True)
    assert [entry.top for entry in alone.logprobs] == [[], [], []]
    with pytest.raises(ValueError, match="logprobs"):
        llm.generate("the", logprobs=vocab_size + 1)


def test_log_probabilities_ignore_every_parameter(llm):
    plain = llm.generate("the", max_new_tokens=1, logprobs=5).logprobs[0]
    greedy = plain.token_id
    out = llm.generate(
        "the",
        max_new_tokens=1,
        logprobs=5,
        logit_bias={greedy: -100.0},
        repetition_penalty=1.7,
        temperature=3.0,
        top_k=1,
        seed=1,
    )
    assert out.token_ids != [greedy]
    assert out.logprobs[0].top == plain.top


def test_a_truncated_prompt_leaves_room_for_one_token_or_min_new_tokens(llm):
    limit = llm.config.context_length
    ids = [5 + index % 200 for index in range(limit + 300)]
    options = {"max_new_tokens": 100, "ignore_eos": True}
    for least, room in ((None, 1), (100, 100)):
        with pytest.warns(UserWarning, match=f"first {300 + room} of {limit + 300} tokens were cut"):
            out = llm.generate(ids, on_overflow="truncate_left", min_new_tokens=least, **options)
        assert (out.prompt_tokens, len(out.token_ids)) == (limit - room, room)
        assert out.token_ids == llm.generate(ids[-(limit - room) :], **options).token_ids


# SamplingParams


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"max_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 3, "max_tokens": 2}, "min_new_tokens"),
        ({"logprobs": -1}, "logprobs"),
        ({"timeout": 0}, "timeout"),
        ({"on_overflow": "shrug"}, "on_overflow"),
    ],
    ids=str,
)
def test_params_out_of_range_are_refused_when_they_are_created(options, name):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**options)


def test_params_that_depend_on_the_model_are_refused_when_they_are_used(llm):
    params = SamplingParams(stop_token_ids=[100_000], min_new_tokens=1000)
    with pytest.raises(ValueError, match="min_new_tokens"):
        llm.generate("the", SamplingParams(min_new_tokens=1000))
    with pytest.raises(ValueError, match="stop_token_ids"):
        llm.generate("the", params, max_new_tokens=2000)


def test_params_are_values():
    options = {
        "stop": ["a", "b"],
        "logit_bias": {3: 1, 4: -2.5},
        "stop_token_ids": [1, 2],
        "temperature": 0.5,
    }
    params = SamplingParams(**options)
    same = SamplingParams(**dict(reversed(options.items())))
    assert params == same
    assert hash(params) == hash(same)
    assert len({params, same, SamplingParams()}) == 2
    for other in (pickle.loads(pickle.dumps(params)), copy.copy(params), copy.deepcopy(params)):
        assert other == params
        assert hash(other) == hash(params)
    with pytest.raises(TypeError, match="did you mean 'top_k'"):
        SamplingParams(topk=3)


def test_params_are_accepted_by_every_generating_method(llm):
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, seed=11)
    messages = [{"role": "user", "content": "hello"}]
    whole, chat = llm.generate("the", params), llm.chat(messages, params)
    assert len(whole.token_ids) == len(chat.token_ids) == 4
    assert "".join(chunk.text for chunk in llm.stream("the", params)) == whole.text
    assert "".join(chunk.text for chunk in llm.stream_chat(messages, params)) == chat.text
    assert [out.text for out in llm.generate(["the"], params)] == [whole.text]


# Tools


def weather(place: str) -> str:
    """Tells the weather."""
    return f"rain in {place}"


@pytest.mark.parametrize("call", ["chat", "stream_chat"])
def test_tools_reach_the_template(llm, call):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    messages = [{"role": "user", "content": "hello"}]
    template = "{% for tool in tools %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
    out = getattr(llm, call)(messages, tools=tools, chat_template=template, max_new_tokens=5, ignore_eos=True)
    text = out.text if call == "chat" else "".join(chunk.text for chunk in out)
    ids = llm.tokenizer.encode("weather hello", add_special_tokens=False)
    assert text == llm.generate(ids, max_new_tokens=5, ignore_eos=True).text


@pytest.mark.parametrize("call", ["chat", "stream_chat"])
@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([weather], r"tools\[0\].* a function: describe it by its JSON schema"),
        ([{"type": "function"}, "weather"], r"tools\[1\].* not str"),
        (weather, "tools must be a list"),
        ({"type": "function"}, "tools must be a list of JSON schemas"),
    ],
    ids=["function", "name", "bare function", "bare schema"],
)
def test_tools_that_are_no_schemas(llm, call, tools, message):
    with pytest.raises(TypeError, match=message):
        getattr(llm, call)([{"role": "user", "content": "hello"}], tools=tools)
