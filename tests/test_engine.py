"""Many requests at once: answers as alone, prefixes shared, blocks returned, and what `metrics` says."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import candle_llama
from candle_llama import SamplingParams

BLOCK = 64
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 12,
    "temperature": 1.0,
    "seed": 3,
    "ignore_eos": True,
    "logprobs": 1,
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(5, 250, length).tolist()


def facts(out: candle_llama.Completion) -> tuple[Any, ...]:
    return out.text, out.token_ids, out.finish_reason, out.logprobs


def block_bytes(llm: candle_llama.Llama) -> int:
    config = llm.config
    bytes_each = {"float32": 4}.get(llm.load_report.kv_dtype, 2)
    heads = config.num_key_value_heads * config.head_dim
    return int(2 * config.num_hidden_layers * heads * BLOCK * bytes_each)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_idle(llm: candle_llama.Llama) -> None:
    metrics = llm.metrics()
    assert (metrics.running, metrics.waiting, metrics.blocks_used) == (0, 0, 0)


# Prefixes


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize(
    ("length", "cached"), [(64, 0), (65, 64), (128, 64), (129, 128), (300, 256), (577, 576)]
)
def test_a_cached_prompt_gives_the_same_bits(tiny: Path, compute: str, length: int, cached: int) -> None:
    ids = prompt(length)
    with candle_llama.load(tiny, device="cpu", compute=compute, prefix_cache=False) as llm:
        expected = facts(llm.generate(ids, **OPTIONS))
        assert facts(llm.generate(ids, **OPTIONS)) == expected
        assert llm.metrics().blocks_cached == 0
    with candle_llama.load(tiny, device="cpu", compute=compute) as llm:
        first, second = llm.generate(ids, **OPTIONS), llm.generate(ids, **OPTIONS)
        assert facts(first) == facts(second) == expected
        assert (first.stats.cached_tokens, second.stats.cached_tokens) == (0, cached)
        assert_idle(llm)


def test_generated_tokens_are_reused_in_exact_mode_only(tiny: Path) -> None:
    for compute, cached in [("auto", 128), ("exact", 192)]:
        with candle_llama.load(tiny, device="cpu", compute=compute) as llm:
            answer = llm.generate(prompt(140), max_new_tokens=80, ignore_eos=True)
            turn = [*prompt(140), *answer.token_ids, *prompt(20, seed=1)]
            out = llm.generate(turn, **OPTIONS)
            assert out.stats.cached_tokens == cached
        with candle_llama.load(tiny, device="cpu", compute=compute, prefix_cache=False) as llm:
            assert facts(llm.generate(turn, **OPTIONS)) == facts(out)


def test_the_next_turn_of_a_chat_finds_the_last_answer() -> None:
    messages = [{"role": "user", "content": "Tell me a long story about a river."}]
    with candle_llama.load("demo", device="cpu") as llm:
        answer = llm.chat(messages, max_new_tokens=200, ignore_eos=True)
        turn = [*messages, {"role": "assistant", "content": answer.text}]
        turn.append({"role": "user", "content": "Go on."})
        until(lambda: llm.metrics().blocks_cached == (answer.prompt_tokens + 200) // BLOCK)
        out = llm.chat(turn, **OPTIONS)
        assert out.stats.cached_tokens == (answer.prompt_tokens + 200) // BLOCK * BLOCK
        assert_idle(llm)
    with candle_llama.load("demo", device="cpu", prefix_cache=False) as llm:
        assert facts(llm.chat(turn, **OPTIONS)) == facts(out)


def test_prompts_of_other_arithmetic_share_nothing(tiny: Path) -> None:
    ids = prompt(400)
    with candle_llama.load(tiny, device="cpu") as llm:
        llm.generate(ids[:100], max_new_tokens=1)
        assert llm.generate(ids, max_new_tokens=1).stats.cached_tokens == 0
        assert llm.generate(ids[:128], max_new_tokens=1).stats.cached_tokens == 64
        assert llm.generate(ids[:200], max_new_tokens=1).stats.cached_tokens == 192


def test_salts_separate_callers(llm):
    ids = prompt(200, seed=77)
    assert llm.generate(ids, max_new_tokens=1, cache_salt="a").stats.cached_tokens == 0
    assert llm.generate(ids, max_new_tokens=1, cache_salt="b").stats.cached_tokens == 0
    assert llm.generate(ids, max_new_tokens=1).stats.cached_tokens == 0
    assert llm.generate(ids, max_new_tokens=1, cache_salt="a").stats.cached_tokens == 192
    with pytest.raises(ValueError, match="cache_salt"):
        llm.generate(ids, cache_salt="a" * 2000)


def test_equal_prompts_of_a_list_are_computed_once(tiny: Path) -> None:
    with candle_llama.load(tiny, device="cpu") as llm:
        outs = llm.generate([prompt(300)] * 5, **OPTIONS)
        assert len({str(facts(out)) for out in outs}) == 1
        assert [out.stats.cached_tokens for out in outs] == [0, 256, 256, 256, 256]
        metrics = llm.metrics()
        assert (metrics.prefix_hits, metrics.tokens_cached, metrics.tokens_in) == (4, 1024, 1500)
        assert metrics.tokens_out == 60
        assert_idle(llm)


def test_scores_and_logits_reuse_what_comes_before_their_rows(tiny: Path) -> None:
    ids = prompt(400)
    with candle_llama.load(tiny, device="cpu", prefix_cache=False) as llm:
        expected = llm.loglikelihood(ids[:300], ids[300:])
        rows = llm.logits(ids, last=50)
    with candle_llama.load(tiny, device="cpu") as llm:
        for _ in range(2):
            assert llm.loglikelihood(ids[:300], ids[300:]) == expected
            assert np.array_equal(llm.logits(ids, last=50), rows)
        assert llm.metrics().prefix_hits > 0


# Little room


def test_answers_in_a_small_cache_are_those_alone(tiny: Path) -> None:
    with candle_llama.load(tiny, device="cpu") as llm:
        size = block_bytes(llm)
        prompts = [prompt(20 + 23 * i, seed=i) for i in range(12)]
        options = {**OPTIONS, "max_new_tokens": 60}
        expected = [facts(llm.generate(ids, **options)) for ids in prompts]
    for prefix_cache in (False, True):
        with candle_llama.load(tiny, device="cpu", kv_cache_bytes=6 * size, prefix_cache=prefix_cache) as llm:
            assert llm.config.context_length == 6 * BLOCK
            assert [facts(out) for out in llm.generate(prompts, **options)] == expected
            assert llm.metrics().preemptions > 0
            assert_idle(llm)
            with pytest.raises(candle_llama.ContextLengthError):
                llm.generate(prompt(6 * BLOCK))


def test_random_requests_at_the_same_time_give_the_answers_alone(tiny: Path) -> None:
    rng = random.Random(5)
    requests = []
    for index in range(40):
        shared = prompt(rng.choice([70, 130, 200]), seed=rng.randrange(3))
        ids = (shared + prompt(rng.randrange(1, 80), seed=100 + index))[: rng.randrange(1, 280)]
        requests.append((ids, {**OPTIONS, "seed": index, "max_new_tokens": rng.randrange(1, 60)}))
    with candle_llama.load(tiny, device="cpu", prefix_cache=False) as llm:
        size = block_bytes(llm)
        expected = [facts(llm.generate(ids, **options)) for ids, options in requests]

    def use(index: int) -> tuple[Any, ...] | None:
        ids, options = requests[index]
        time.sleep(rng.random() / 100)
        kind = index % 4
        if kind == 0:
            return facts(llm.generate(ids, **options))
        if kind == 1:
            chunks = list(llm.stream(ids, **options))
            logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            return "".join(chunk.text for chunk in chunks), tokens, chunks[-1].finish_reason, logprobs
        if kind == 2:
            out = llm.generate(ids, **{**options, "timeout": rng.random() / 200})
            assert out.token_ids == expected[index][1][: len(out.token_ids)]
            return None
        with llm.stream(ids, **options) as stream:
            next(stream)
        return None

    with candle_llama.load(tiny, device="cpu", kv_cache_bytes=6 * size) as llm:
        for _ in range(3):
            with ThreadPoolExecutor(16) as pool:
                found = list(pool.map(use, range(len(requests))))
            for one, other in zip(found, expected, strict=True):
                assert one is None or one == other
            deadline = time.monotonic() + 2
            while llm.metrics().running + llm.metrics().waiting and time.monotonic() < deadline:
                time.sleep(0.01)
            assert_idle(llm)


# Lists


def test_each_prompt_of_a_list_may_have_its_own_parameters(llm):
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in (2, 5, 9)]
    outs = llm.generate(["a", "b", "c"], params)
    assert [len(out.token_ids) for out in outs] == [2, 5, 9]
    outs = llm.generate(["a", "b", "c"], params, max_new_tokens=4)
    assert [len(out.token_ids) for out in outs] == [4, 4, 4]
    with pytest.raises(ValueError, match="2 params for 3 prompts"):
        llm.generate(["a", "b", "c"], params[:2])
    with pytest.raises(TypeError, match="for a list of prompts"):
        llm.generate("a", params)


def test_an_error_takes_the_place_of_its_prompt(llm):
    prompts = ["a", [10**6], 5.0, [5] * 100_000, "b"]
    outs = llm.generate(prompts, max_new_tokens=3, return_exceptions=True)
    kinds = [type(out).__name__ for out in outs]
    assert kinds == ["Completion", "ValueError", "TypeError", "ContextLengthError", "Completion"]
    assert facts(outs[4]) == facts(llm.generate("b", max_new_tokens=3))


def test_a_list_may_be_longer_than_what_runs_together(tiny: Path) -> None:
    with candle_llama.load(tiny, device="cpu", max_num_seqs=2) as llm:
        outs = llm.generate([[5 + i % 200] for i in range(1500)], max_new_tokens=2, ignore_eos=True)
        assert len(outs) == 1500
        assert all(len(out.token_ids) == 2 for out in outs)
        assert_idle(llm)


def test_progress_is_quiet_without_a_terminal(llm, capfd):
    llm.generate(["a", "b"], max_new_tokens=2, progress=True)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(TypeError, match="for a list of prompts"):
        llm.generate("a", progress=True)


# Sharing the model


def test_threads_share_forward_passes(demo_llm: candle_llama.Llama) -> None:
    ids = [prompt(20, seed=i) for i in range(8)]
    options = {**OPTIONS, "max_new_tokens": 60}
    expected = [facts(demo_llm.generate(one, **options)) for one in ids]
    most = 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, demo_llm.metrics().running)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda one: demo_llm.generate(one, **options), ids))
    done.set()
    watcher.join()
    assert most > 2
    assert [facts(out) for out in outs] == expected


def test_the_candle_engine_is_shared_fairly(tiny: Path) -> None:
    with candle_llama.load(tiny, device="cpu", engine="candle") as llm:
        expected = [llm.generate([5 + i, 6], max_new_tokens=5).token_ids for i in range(6)]
        began = threading.Event()
        ends = {}

        def long() -> None:
            for _ in llm.stream("hello", max_new_tokens=400, ignore_eos=True):
                began.set()
            ends["long"] = time.monotonic()

        thread = threading.Thread(target=long)
        thread.start()
        began.wait(10)
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda i: llm.generate([5 + i, 6], max_new_tokens=5).token_ids, range(6)))
        ends["short"] = time.monotonic()
        thread.join()
        assert found == expected
        assert ends["short"] < ends["long"]
        assert llm.metrics().blocks_cached == 0


def test_metrics_are_frozen_and_refused_after_close(tiny: Path) -> None:
    llm = candle_llama.load(tiny, device="cpu")
    metrics = llm.metrics()
    assert metrics.tokens_out == 0
    assert metrics.blocks_free > 0
    with pytest.raises(AttributeError):
        metrics.running = 3
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        llm.metrics()
