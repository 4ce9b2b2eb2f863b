"""The tensor engine on Candle's CPU device. Its parity with NumPy is checked in test_parity.py, its passes of
several sequences in tests/rust/forward.rs.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama.bench.numpy_llama import NumpyLlama

PROMPTS: list[Any] = ["hello", "the world and", [checkpoints.BOS, 5, 6], "wording " * 60, [5, 9] * 200, "and"]


def load(path: Path, **options: Any) -> candle_llama.Llama:
    return candle_llama.load(path, device="cpu", engine="tensor", **options)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[candle_llama.Llama]:
    with load(tiny, compute="exact") as llm:
        yield llm


def test_a_list_equals_each_prompt_alone(llm: candle_llama.Llama) -> None:
    options = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    alone = [llm.generate(prompt, **options) for prompt in PROMPTS]
    together = llm.generate(PROMPTS * 7, **options)
    for expected, got in zip(alone * 7, together, strict=True):
        assert got.token_ids == expected.token_ids
        np.testing.assert_allclose(
            [entry.logprob for entry in got.logprobs],
            [entry.logprob for entry in expected.logprobs],
            rtol=0,
            atol=1e-5,
        )


def test_running_sequences_share_every_pass(tiny: Path) -> None:
    with load(tiny, max_num_seqs=8) as llm:
        outs = llm.generate([[5 + i, 6, 7] for i in range(9)], max_new_tokens=64, ignore_eos=True)
    # The time of a pass is added, to the nanosecond, to every sequence that takes part in it.
    decode_seconds = [out.stats.decode_seconds for out in outs]
    assert len(set(decode_seconds[:8])) == 1
    assert decode_seconds[8] != decode_seconds[0]


def test_more_streams_than_slots_lose_none(tiny: Path) -> None:
    """Streams that nobody reads keep their slots until others need them."""
    each = candle_llama.estimate_memory(tiny, device="cpu", engine="tensor", context_length=256).kv_cache
    with load(tiny, context_length=256, kv_cache_bytes=5 * each, compute="exact") as llm:
        options = {"max_new_tokens": 150, "temperature": 0, "ignore_eos": True}
        expected = [llm.generate([5 + i, 6, 7], **options).token_ids for i in range(12)]
        streams = [llm.stream([5 + i, 6, 7], **options) for i in range(12)]
        firsts = [next(stream) for stream in streams]
        found = [
            [*first.token_ids, *(token for chunk in stream for token in chunk.token_ids)]
            for first, stream in zip(firsts, streams, strict=True)
        ]
        assert found == expected
        assert llm.metrics().preemptions > 0


def test_cancelled_streams_and_timeouts_leave_the_others_alone(llm: candle_llama.Llama) -> None:
    options = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
    expected = llm.generate("hello", **options).token_ids
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(llm.generate, "hello", **options) for _ in range(3)]
        for _ in range(5):
            stream = llm.stream("the", max_new_tokens=400, ignore_eos=True)
            next(stream)
            stream.close()
        out = llm.generate(
            "the", max_new_tokens=100_000, timeout=0.2, on_overflow="truncate_left", ignore_eos=True
        )
        assert out.finish_reason in ("timeout", "length")
        assert [other.result().token_ids for other in others] == [expected] * 3


def test_a_long_score_equals_numpy(tiny: Path, llm: candle_llama.Llama) -> None:
    ids = [5 + index % 200 for index in range(1000)]
    rows = NumpyLlama.load(tiny).forward(ids)[:-1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    expected = logprobs[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(llm.score(ids).logprobs[1:], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("type_name", ["BF16", "Q4_1", "Q8_0", "Q4_K", "IQ4_XS"])
def test_weights_keep_their_type_unless_a_type_is_given(tmp_path: Path, type_name: str) -> None:
    config = checkpoints.gguf_config(hidden_size=256, intermediate_size=512)
    path = checkpoints.write_gguf(tmp_path / "model.gguf", config, matrix_type=type_name)
    ids = np.random.default_rng(5).integers(0, checkpoints.VOCAB_SIZE, 60).tolist()
    expected = NumpyLlama.load(path).forward(ids)
    bound = 2e-4 * np.abs(expected).max()
    with load(path) as llm, candle_llama.load(path, device="cpu", compute="exact") as cpu:
        assert llm.load_report.storage == cpu.load_report.storage
        assert llm.load_report.isa == cpu.load_report.isa
        assert not any("converted" in note for note in llm.load_report.notes)
        np.testing.assert_allclose(llm.logits(ids), expected, rtol=0, atol=bound)
    with load(path, dtype="float32") as llm:
        assert set(llm.load_report.storage) == {"F32"}
        assert llm.load_report.isa is None
        assert any(f"{type_name} are converted" in note for note in llm.load_report.notes)
        np.testing.assert_allclose(llm.logits(ids), expected, rtol=0, atol=bound)


def test_the_estimate_is_what_is_loaded(tmp_path: Path) -> None:
    path = checkpoints.write_gguf(tmp_path / "model.gguf", matrix_type="Q8_0")
    for options in ({}, {"dtype": "float32"}):
        estimate = candle_llama.estimate_memory(path, device="cpu", engine="tensor", **options)
        with load(path, **options) as llm:
            assert estimate.engine == llm.load_report.engine == "tensor"
            assert estimate.weights == llm.load_report.bytes
            positions = llm.config.context_length
        assert estimate.kv_cache == positions * 4 * 2 * kv_numbers(path)


def kv_numbers(path: Path) -> int:
    config = NumpyLlama.load(path).config
    heads = config["num_key_value_heads"] * config.get("head_dim", 16)
    return int(config["num_hidden_layers"] * heads)


def test_what_it_cannot_do_is_refused_by_name(tiny: Path) -> None:
    for options, match in (
        ({"quantize": "q8_0"}, "quantize"),
        ({"kv_dtype": "bfloat16"}, "kv_dtype"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ):
        with pytest.raises(candle_llama.UnsupportedModelError, match=match):
            load(tiny, **options)


def test_memory_stays_flat_while_it_decodes(tiny: Path) -> None:
    with load(tiny, context_length=1024) as llm:
        stream = llm.stream([5, 6, 7], max_new_tokens=1000, ignore_eos=True)
        resident = []
        for count, _ in enumerate(stream):
            if count in (600, 990):
                resident.append(resident_bytes())
    # Copies of the keys and values for each of the 390 tokens would be some hundred megabytes.
    assert resident[1] - resident[0] < 2 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ctrl_c_ends_a_long_prompt(demo: Path) -> None:
    with load(demo, context_length=4096) as llm:
        llm.generate("the", max_new_tokens=1)
        sent = []

        def interrupt() -> None:
            time.sleep(0.3)
            sent.append(time.monotonic())
            signal.raise_signal(signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate([5] * 4000, max_new_tokens=1)
        assert time.monotonic() - sent[0] < 0.5
        thread.join()
        assert len(llm.generate("the", max_new_tokens=3, ignore_eos=True).token_ids) == 3
