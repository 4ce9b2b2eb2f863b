"""The tensor and the candle engine on a GPU; their parity with NumPy is checked in test_parity.py."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from accelerators import accelerators
from candle_llama import bench
from candle_llama.bench.numpy_llama import NumpyLlama

pytestmark = pytest.mark.skipif(not accelerators(), reason="this build or this machine has no GPU")
on_each = pytest.mark.parametrize("device", accelerators() or ["none"])


def test_auto_is_the_first_gpu(tiny: Path) -> None:
    with candle_llama.load(tiny) as llm:
        assert llm.load_report.device == accelerators()[0]
        assert llm.load_report.engine == "tensor"


@on_each
def test_what_the_device_cannot_run_runs_on_the_cpu(tmp_path: Path, device: str) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "model", checkpoints.VARIANTS["attention-bias"])
    with candle_llama.load(path, device=device) as llm:
        assert (llm.load_report.engine, llm.load_report.device) == ("tensor", device)
    with candle_llama.load(path, device=device, quantize="q8_0") as llm:
        assert (llm.load_report.engine, llm.load_report.device) == ("cpu", "cpu")
        assert any("quantize" in note for note in llm.load_report.notes)
        assert llm.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True).token_ids
    # The CPU's memory counts then, not the device's.
    estimate = candle_llama.estimate_memory(path, device=device, quantize="q8_0")
    assert estimate == candle_llama.estimate_memory(path, device="cpu", quantize="q8_0")
    with pytest.raises(candle_llama.UnsupportedModelError, match="attention_bias"):
        candle_llama.load(path, device=device, engine="candle")


@on_each
def test_the_cpu_engine_refuses_a_gpu(tiny: Path, device: str) -> None:
    with pytest.raises(ValueError, match="cpu"):
        candle_llama.load(tiny, device=device, engine="cpu")


@on_each
@pytest.mark.parametrize("engine", ["tensor", "candle"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_numpy(tmp_path: Path, device: str, dtype: str, engine: str) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "model", dtype=dtype)
    # More than a chunk, whose second part sees the keys and values of the first.
    ids = np.random.default_rng(5).integers(0, checkpoints.VOCAB_SIZE, 600).tolist()
    expected = NumpyLlama.load(path).forward(ids)[-100:]
    with candle_llama.load(path, device=device, engine=engine) as llm:
        assert list(llm.load_report.storage) == [{"bfloat16": "BF16", "float16": "F16"}[dtype]]
        error = np.abs(llm.logits(ids, last=100) - expected).max() / np.abs(expected).max()
    # A dozen successive roundings to 8 or 11 bits.
    assert error < {"bfloat16": 5e-2, "float16": 8e-3}[dtype]


@on_each
@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_quantised_weights_stay_quantised(tmp_path: Path, device: str, type_name: str) -> None:
    config = checkpoints.gguf_config(hidden_size=256, intermediate_size=512)
    path = checkpoints.write_gguf(tmp_path / "model.gguf", config, matrix_type=type_name)
    ids = np.random.default_rng(5).integers(0, checkpoints.VOCAB_SIZE, 60).tolist()
    expected = NumpyLlama.load(path).forward(ids)
    with candle_llama.load(path, device=device) as llm:
        assert type_name in llm.load_report.storage
        error = np.abs(llm.logits(ids) - expected).max() / np.abs(expected).max()
    # Activations have 8 bits there.
    assert error < 0.15


@on_each
def test_a_list_equals_each_prompt_alone(tiny: Path, device: str) -> None:
    prompts = [[5 + i, *range(6, 6 + 7 * i), 7] for i in range(16)]
    options = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    with candle_llama.load(tiny, device=device, compute="exact") as llm:
        alone = [llm.generate(prompt, **options) for prompt in prompts]
        for expected, got in zip(alone, llm.generate(prompts, **options), strict=True):
            assert got.token_ids == expected.token_ids
            np.testing.assert_allclose(
                [entry.logprob for entry in got.logprobs],
                [entry.logprob for entry in expected.logprobs],
                rtol=0,
                atol=1e-4,
            )


@on_each
@pytest.mark.parametrize("prompt_tokens", [40, 1100])
@pytest.mark.parametrize("head_dim", [32, 40, 64, 128])
def test_a_token_alone_equals_the_same_token_in_a_prompt(
    tmp_path: Path, device: str, head_dim: int, prompt_tokens: int
) -> None:
    # On Metal, a token alone has another kernel, from 1,024 positions on a third, for some of the sizes.
    config = checkpoints.tiny_config(head_dim=head_dim, max_position_embeddings=2048)
    path = checkpoints.write_checkpoint(tmp_path / "model", config)
    prompt = np.random.default_rng(7).integers(0, checkpoints.VOCAB_SIZE, prompt_tokens).tolist()
    with candle_llama.load(path, device=device, compute="exact") as llm:
        output = llm.generate(prompt, max_new_tokens=20, temperature=0, ignore_eos=True, logprobs=0)
        expected = llm.score(prompt + output.token_ids).logprobs[prompt_tokens:]
    got = [entry.logprob for entry in output.logprobs]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@on_each
def test_seeds_reproduce_in_many_threads(tiny: Path, device: str) -> None:
    with candle_llama.load(tiny, device=device) as llm:
        options = {"max_new_tokens": 20, "temperature": 1.0, "ignore_eos": True}
        expected = [llm.generate([1, 2, 3], seed=seed, **options).token_ids for seed in range(4)]
        assert len({tuple(ids) for ids in expected}) > 1
        got: dict[int, list[int]] = {}

        def run(seed: int) -> None:
            got[seed] = llm.generate([1, 2, 3], seed=seed, **options).token_ids

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [got[seed] for seed in range(4)] == expected


@on_each
def test_a_timeout_ends_it(tiny: Path, device: str) -> None:
    with candle_llama.load(tiny, device=device) as llm:
        llm.generate([1], max_new_tokens=1)
        started = time.monotonic()
        output = llm.generate(
            [1, 2, 3], max_new_tokens=100_000, timeout=0.2, on_overflow="truncate_left", ignore_eos=True
        )
        assert time.monotonic() - started < 2
        assert output.finish_reason in ("timeout", "length")


@on_each
def test_scores_equal_those_of_the_cpu(tiny: Path, device: str) -> None:
    ids = np.random.default_rng(6).integers(0, checkpoints.VOCAB_SIZE, 60).tolist()
    with candle_llama.load(tiny, device="cpu", compute="exact") as llm:
        expected = llm.score(ids)
    with candle_llama.load(tiny, device=device, compute="exact") as llm:
        score = llm.score(ids)
    np.testing.assert_allclose(score.logprobs[1:], expected.logprobs[1:], atol=1e-3)
    assert score.perplexity == pytest.approx(expected.perplexity, rel=1e-3)


@on_each
def test_the_benchmark_measures_the_device(tiny: Path, device: str) -> None:
    result = bench.run_bench(tiny, device=device, prompt_tokens=24, new_tokens=6, runs=1)
    assert result.device == device
    assert [engine.engine for engine in result.engines] == ["tensor", "candle", "transformers"]
    assert [engine.failed for engine in result.engines] == [None] * 3
    assert result.engine("tensor").runs
    assert result.engine("candle").runs


@on_each
def test_the_demo_answers(demo: Path, device: str) -> None:
    with candle_llama.load(demo, device=device) as llm:
        output = llm.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=24)
    assert "Paris" in output.text
