"""`score` and `loglikelihood`, compared with the logits and with greedy decoding."""

import dataclasses
import json
import math
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama import ContextLengthError, LogLikelihood, Score

TEXT = "hello the world and a wording"


def log_softmax(logits):
    rows = logits.astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def test_a_score_is_the_log_softmax_of_the_logits(llm):
    ids = llm.tokenizer.encode(TEXT)
    score = llm.score(TEXT)
    assert isinstance(score, Score)
    assert score.token_ids == ids
    assert score.logprobs[0] is None
    expected = log_softmax(llm.logits(ids))[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(score.logprobs[1:], expected, rtol=0, atol=1e-5)
    assert score.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-5)
    assert llm.score(ids) == llm.score(np.array(ids)) == score


def test_a_score_agrees_with_the_log_probabilities_of_generated_tokens(tiny):
    # In exact mode prefill and decode agree bit for bit.
    with candle_llama.load(tiny, compute="exact") as llm:
        prompt = llm.tokenizer.encode(TEXT)
        out = llm.generate(prompt, max_new_tokens=20, logprobs=0, temperature=1.0, seed=1, ignore_eos=True)
        score = llm.score(prompt + out.token_ids)
        assert score.logprobs[len(prompt) :] == [entry.logprob for entry in out.logprobs]


def test_a_list_of_texts_gives_a_list_in_the_same_order(llm):
    texts = [TEXT, [5, 6, 7], "the"]
    assert llm.score(texts) == [llm.score(text) for text in texts]
    assert llm.score([]) == []


@pytest.mark.parametrize("engine", ["cpu", "tensor", "candle"])
def test_engines_agree(tiny, engine):
    with (
        candle_llama.load(tiny, engine="cpu", compute="exact") as expected,
        candle_llama.load(tiny, engine=engine, device="cpu", compute="exact") as other,
    ):
        np.testing.assert_allclose(
            other.score(TEXT).logprobs[1:], expected.score(TEXT).logprobs[1:], rtol=0, atol=1e-4
        )


def test_a_text_longer_than_a_chunk(llm):
    ids = [5 + index % 200 for index in range(1000)]
    expected = log_softmax(llm.logits(ids))[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(llm.score(ids).logprobs[1:], expected, rtol=0, atol=1e-5)


def test_the_last_token_needs_no_room_in_the_context(llm):
    limit = llm.config.context_length
    assert len(llm.score([5] * (limit + 1)).logprobs) == limit + 1
    with pytest.raises(ContextLengthError) as caught:
        llm.score([5] * (limit + 2))
    assert (caught.value.prompt_tokens, caught.value.context_length) == (limit + 2, limit)
    with pytest.raises(ContextLengthError):
        llm.loglikelihood([5] * limit, [5, 6])


@pytest.mark.parametrize("prompt", ["", [5], np.array([], np.int64), [5, 10**6], ["the", ""]], ids=str)
def test_prompts_that_cannot_be_scored(llm, prompt):
    with pytest.raises(ValueError, match=r"prompt|token"):
        llm.score(prompt)


@pytest.mark.parametrize("prompt", [None, 3, b"x", [1.5], np.zeros(2), {"a": 1}], ids=str)
def test_prompts_of_the_wrong_type(llm, prompt):
    with pytest.raises(TypeError, match="prompt"):
        llm.score(prompt)
    with pytest.raises(TypeError, match="context"):
        llm.loglikelihood(prompt, "the")
    with pytest.raises(TypeError, match="continuation"):
        llm.loglikelihood("the", prompt)


def test_a_continuation_is_scored_after_its_context(llm):
    context, continuation = llm.tokenizer.encode("hello the"), [7, 8, 9]
    found = llm.loglikelihood(context, continuation)
    assert isinstance(found, LogLikelihood)
    assert found.token_ids == continuation
    assert found.logprobs == llm.score(context + continuation).logprobs[len(context) :]
    assert found.sum == pytest.approx(sum(found.logprobs))


def test_is_greedy_agrees_with_greedy_decoding(llm):
    context = llm.tokenizer.encode("hello the")
    greedy = llm.generate(context, max_new_tokens=6, ignore_eos=True).token_ids
    assert llm.loglikelihood(context, greedy).is_greedy
    for index in range(6):
        changed = [*greedy]
        changed[index] = (changed[index] + 1) % 250
        assert not llm.loglikelihood(context, changed).is_greedy


def test_two_texts_are_split_as_the_harness_does(llm):
    def ids(text):
        return llm.tokenizer.encode(text)

    whole = ids("hello the world")
    expected = llm.loglikelihood(whole[:-1], whole[-1:])
    assert llm.loglikelihood("hello the", " world") == expected
    # Spaces at the end of the context belong to the continuation.
    assert llm.loglikelihood("hello the ", "world") == expected
    spaces = llm.loglikelihood("hello \n\t\x1f", "the")
    assert spaces == llm.loglikelihood("hello", " \n\t\x1fthe")
    assert spaces.token_ids == ids("hello \n\t\x1fthe")[len(ids("hello")) :]
    # A token may span the end of the context: the context keeps as many tokens as it has alone.
    seam = llm.loglikelihood("he", "llo the")
    assert seam.token_ids == ids("hello the")[len(ids("he")) :]
    assert seam == llm.loglikelihood(ids("he"), seam.token_ids)


def test_text_and_ids_can_be_mixed(llm):
    own = llm.tokenizer.encode(" world", add_special_tokens=False)
    context = llm.tokenizer.encode("hello the")
    expected = llm.loglikelihood(context, own)
    assert llm.loglikelihood("hello the", own) == expected
    assert llm.loglikelihood(context, " world") == expected


def test_an_empty_context_is_bos_where_the_tokenizer_adds_it(llm, demo_llm):
    assert llm.loglikelihood("", "the") == llm.loglikelihood([checkpoints.BOS], "the")
    with pytest.raises(ValueError, match="context"):
        demo_llm.loglikelihood("", "the")
    for context in ([], np.array([], np.int64)):
        with pytest.raises(ValueError, match="context"):
            llm.loglikelihood(context, "the")


@pytest.mark.parametrize(
    ("context", "continuation"),
    # The last pair becomes one token. The context alone has one too, so no token is left to score.
    [("hello", ""), ("hello", []), ([5], ""), ("wor", "ld")],
)
def test_a_continuation_without_tokens_of_its_own(llm, context, continuation):
    with pytest.raises(ValueError, match="continuation"):
        llm.loglikelihood(context, continuation)


def test_a_real_model_knows_the_capital_of_france(demo_llm):
    question = "The capital of France is"
    answers = [" London", " Paris", " Berlin"]
    found = [demo_llm.loglikelihood(question, answer) for answer in answers]
    assert max(range(3), key=lambda index: found[index].sum) == 1
    assert found[1].is_greedy
    assert demo_llm.score(f"{question} Paris.").perplexity < demo_llm.score("Paris a the of is.").perplexity


def test_results_are_frozen_and_can_be_pickled(llm):
    for result in (llm.score("the world"), llm.loglikelihood("the", " world")):
        assert pickle.loads(pickle.dumps(result)) == result
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.token_ids = []


def test_a_closed_model_scores_nothing(tiny):
    llm = candle_llama.load(tiny)
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        llm.score("the world")
    with pytest.raises(ValueError, match="closed"):
        llm.loglikelihood("the", " world")


def in_a_process(code: str, *arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MEMORY = """
import json, resource, sys
import candle_llama

llm = candle_llama.load(sys.argv[1])
llm.score([5] * 100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
llm.score([5] * 1000)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
def test_memory_does_not_grow_with_tokens_times_vocabulary(tmp_path):
    config = checkpoints.tiny_config(vocab_size=128_000, num_hidden_layers=1)
    folder = checkpoints.write_checkpoint(tmp_path / "model", config, tokenizer=False)
    grown = in_a_process(MEMORY, folder) * 1024
    # All rows of logits would be 488 MiB; a chunk is at most 64 MiB, most of which the first text allocated.
    assert grown < 100 * 1024**2


INTERRUPTED = """
import json, sys, time
import candle_llama

llm = candle_llama.load(sys.argv[1])
print("begun", flush=True)
try:
    llm.score([5] * 8000)
    print(json.dumps(None))
except KeyboardInterrupt:
    interrupted = time.monotonic()
    worked = time.process_time()
    time.sleep(0.5)
    rested = time.process_time() - worked
    print(json.dumps([interrupted, rested, len(llm.score("One, two, three").logprobs)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_scoring_within_200_ms_and_leaves_the_model_usable(demo):
    def interrupt() -> float:
        with subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, str(demo)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout.readline() == "begun\n"
            time.sleep(0.4)
            sent = time.monotonic()
            child.send_signal(signal.SIGINT)
            interrupted, rested, tokens = json.loads(child.stdout.readline())
        assert rested < 0.1
        assert tokens > 2
        return interrupted - sent

    # The fastest of three tries: the limit applies to this package, not to other load on the machine.
    assert min(interrupt() for _ in range(3)) <= 0.2
