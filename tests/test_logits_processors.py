"""Python functions that change logits before a token is drawn."""

import asyncio
import gc
import pickle
import signal
import threading
import time

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama import SamplingParams


def only(token_id):
    def processor(token_ids, logits):
        keep = logits[token_id]
        logits[:] = -np.inf
        logits[token_id] = keep

    return processor


def ban_all(token_ids, logits):
    logits[:] = -np.inf


class BrokenError(Exception):
    pass


def fail(token_ids, logits):
    raise BrokenError("on purpose")


def test_a_processor_gets_ids_and_logits_and_changes_them_in_place(llm):
    seen = []
    prompt = llm.tokenizer.encode("the world")

    def look(token_ids, logits):
        seen.append((token_ids, logits.copy()))
        assert token_ids.dtype == np.int64
        assert (logits.dtype, logits.shape) == (np.float32, (llm.config.vocab_size,))

    out = llm.generate(prompt, max_new_tokens=5, logits_processors=[look])
    assert out.token_ids == llm.generate(prompt, max_new_tokens=5).token_ids
    assert [ids.tolist() for ids, _ in seen] == [prompt + out.token_ids[:n] for n in range(5)]
    np.testing.assert_array_equal(seen[0][1], llm.logits(prompt, last=1)[0])
    out = llm.generate(prompt, max_new_tokens=3, logits_processors=[only(40)])
    assert out.token_ids == [40] * 3


def test_a_processor_may_return_other_logits(llm):
    for kind in (np.float32, np.float64, list):

        def other(token_ids, logits, kind=kind):
            row = np.zeros(len(logits))
            row[41] = 9
            return list(row) if kind is list else row.astype(kind)

        assert llm.generate("the", max_new_tokens=2, logits_processors=[other]).token_ids == [41, 41]


def test_processors_run_in_order_after_the_bias(llm):
    seen = []

    def first(token_ids, logits):
        seen.append(float(logits[7]))
        return logits + 1

    def second(token_ids, logits):
        seen.append(float(logits[7]))

    llm.generate("the", max_new_tokens=1, logit_bias={7: 1000.0}, logits_processors=[first, second])
    assert seen[0] > 900
    assert seen[1] == pytest.approx(seen[0] + 1)


def test_arrays_may_be_kept(llm):
    kept = []

    def keep(token_ids, logits):
        kept.append((token_ids, logits, logits.copy()))

    llm.generate("the", max_new_tokens=20, logits_processors=[keep])
    gc.collect()
    for _, logits, copy in kept:
        np.testing.assert_array_equal(logits, copy)


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (fail, BrokenError, "on purpose"),
        (ban_all, candle_llama.GenerationError, "no token is left to draw"),
        (lambda ids, logits: logits * np.nan, candle_llama.GenerationError, "a logits processor returned"),
        (lambda ids, logits: logits[:-1], ValueError, "must return None or an array of shape"),
        (lambda ids, logits: "text", ValueError, "could not convert string"),
        (lambda ids: None, TypeError, "positional argument"),
        (lambda ids, logits: logits[None], ValueError, "not of"),
    ],
    ids=range(7),
)
def test_an_error_ends_its_own_request_and_is_raised_as_it_is(llm, processor, error, message):
    bad = SamplingParams(max_new_tokens=3, logits_processors=[processor])
    good = SamplingParams(max_new_tokens=3)
    with pytest.raises(error, match=message):
        llm.generate("the", bad)
    with pytest.raises(error, match=message):
        list(llm.stream("the", bad))
    outs = llm.generate(["the"] * 3, [good, bad, good], return_exceptions=True)
    assert [type(out) for out in outs] == [candle_llama.Completion, error, candle_llama.Completion]

    async def read():
        return [chunk async for chunk in llm.astream("the", bad)]

    with pytest.raises(error, match=message):
        asyncio.run(read())
    with pytest.raises(error, match=message):
        asyncio.run(llm.agenerate("the", bad))


def test_a_processor_cannot_use_its_own_model(llm):
    def ask(token_ids, logits):
        llm.generate("the", max_new_tokens=1)

    with pytest.raises(candle_llama.GenerationError, match="cannot use its own model"):
        llm.generate("the", max_new_tokens=1, logits_processors=[ask])


def test_a_processor_cannot_read_a_stream_of_its_own_model(llm):
    stream = llm.stream("the", max_new_tokens=9)
    with pytest.raises(candle_llama.GenerationError, match="cannot use its own model"):
        llm.generate("the", max_new_tokens=2, logits_processors=[lambda ids, logits: next(stream) and None])
    assert len(list(stream)) > 0


def test_a_processor_can_close_its_own_model(tiny):
    llm = candle_llama.load(tiny)
    with pytest.raises(ValueError, match="closed"):
        llm.generate("the", max_new_tokens=3, logits_processors=[lambda ids, logits: llm.close()])
    with pytest.raises(ValueError, match="closed"):
        llm.generate("the", max_new_tokens=1)
    llm.close()


def test_stop_iteration_of_a_processor_does_not_end_a_stream_silently(llm):
    def stop(token_ids, logits):
        raise StopIteration

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(llm.stream("the", max_new_tokens=3, logits_processors=[stop]))


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_what_ends_the_program_is_raised_from_lists_too(llm, return_exceptions):
    def leave(token_ids, logits):
        raise SystemExit("on purpose")

    with pytest.raises(SystemExit, match="on purpose"):
        llm.generate(
            ["the"], max_new_tokens=3, logits_processors=[leave], return_exceptions=return_exceptions
        )


def test_a_model_can_be_closed_and_deleted_while_a_processor_runs(tiny):
    for end in (lambda llm: llm.close(), lambda llm: None):
        llm = candle_llama.load(tiny)
        running = threading.Event()

        def slow(token_ids, logits, running=running):
            running.set()
            time.sleep(0.05)

        stream = llm.stream("the", max_new_tokens=200, logits_processors=[slow])
        next(stream)
        running.wait()
        end(llm)
        del llm
        gc.collect()
        del stream


def test_a_slow_processor_can_be_interrupted(llm):
    def slow(token_ids, logits):
        time.sleep(0.1)

    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.35)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        llm.generate("the", max_new_tokens=500, ignore_eos=True, logits_processors=[slow])
    assert time.monotonic() - began < 1.5


def test_the_answer_follows_its_constraint_whatever_processors_do(llm):
    out = llm.generate("the", regex="[ab]{3}", logits_processors=[lambda ids, logits: np.zeros_like(logits)])
    assert len(out.text) == 3


@pytest.mark.parametrize("given", [fail, [1], "f", {fail}])
def test_what_is_no_list_of_functions(llm, given):
    with pytest.raises(TypeError, match="must be a"):
        llm.generate("the", logits_processors=given)


def test_params_with_processors_are_values():
    params = SamplingParams(logits_processors=[ban_all])
    assert params == SamplingParams(logits_processors=(ban_all,))
    assert hash(params) == hash(SamplingParams(logits_processors=[ban_all]))
    assert pickle.loads(pickle.dumps(params)) == params


def test_many_requests_with_processors_run_together(llm):
    prompts = ["the", "a", "world"] * 5
    ids = [checkpoints.TOKEN_IDS[name] for name in "abcdefghijklmno"]
    params = [SamplingParams(max_new_tokens=4, logits_processors=[only(one)]) for one in ids]
    outs = llm.generate(prompts, params)
    assert [out.token_ids for out in outs] == [[one] * 4 for one in ids]
