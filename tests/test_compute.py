"""The precision of `compute="auto"`, `quantize` on load, and `kv_dtype`."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import candle_llama
import tiny
from candle_llama.bench.numpy_llama import NumpyLlama

QUANTIZED = [
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]
# The longest prompt that uses the matrix products of decode, and the longest one with 16-bit activations.
PHRASE = 16
SHORT_PROMPT = 128


def ids(count: int, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, tiny.VOCAB_SIZE, count).tolist()


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """The root mean square of the difference, relative to that of `expected`."""
    return float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_auto_is_close_to_exact_and_closer_in_short_prompts(tmp_path: Path, type_name: str) -> None:
    # Rows of 256 and 512 columns are whole blocks of every type.
    config = tiny.gguf_config(hidden_size=256, intermediate_size=512)
    path = tiny.write_gguf(tmp_path / "model.gguf", config, matrix_type=type_name)
    reference = NumpyLlama.load(path)
    with candle_llama.load(path, device="cpu") as llm:
        phrase, short, long = (
            error(llm.logits(ids(count)), reference.forward(ids(count)))
            for count in (PHRASE, SHORT_PROMPT, SHORT_PROMPT + 1)
        )
        # Keys and values in float16 have a relative error of up to 2^-11.
        assert max(phrase, short) < 3e-3
        assert long < 0.05
        assert short < long or llm.load_report.isa == "scalar"


def test_an_outlier_does_not_cost_its_neighbours_precision(tmp_path: Path) -> None:
    outlier = 5
    config = tiny.tiny_config(hidden_size=256)
    tensors = tiny.tiny_tensors(config)
    # As in trained models, the norms make one element a hundred times larger. The weights compensate for it.
    for name, values in tensors.items():
        if name.endswith("norm.weight"):
            values[outlier] *= 100
        elif name.endswith("embed_tokens.weight"):
            values[:, outlier] = np.where(values[:, outlier] < 0, -1, 1)
        elif name.endswith("proj.weight") and values.shape[1] == config["hidden_size"]:
            values[:, outlier] /= 100
    tiny.write_checkpoint(tmp_path, config, tensors=tensors)
    prompt = ids(SHORT_PROMPT + 1)
    with (
        candle_llama.load(tmp_path, device="cpu", quantize="q8_0") as auto,
        candle_llama.load(tmp_path, device="cpu", quantize="q8_0", compute="exact") as exact,
    ):
        # With 8 bits alone the error is 0.7 to 0.8.
        assert error(auto.logits(prompt), exact.logits(prompt)) < 0.05


@pytest.mark.parametrize("stored", ["q8_0", None])
def test_the_output_head_of_a_prompt_uses_16_bits(tmp_path: Path, stored: Any) -> None:
    config = tiny.tiny_config(hidden_size=256)
    tensors = tiny.tiny_tensors(config)
    # The layers add nothing, so that only the head rounds.
    for name, values in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            values[:] = 0
    tiny.write_checkpoint(tmp_path, config, tensors=tensors, dtype="bfloat16")
    prompt = ids(SHORT_PROMPT + 1)
    with (
        candle_llama.load(tmp_path, device="cpu", quantize=stored) as auto,
        candle_llama.load(tmp_path, device="cpu", quantize=stored, compute="exact") as exact,
    ):
        got, expected = auto.logits(prompt), exact.logits(prompt)
        # With 8 bits the error would be 4e-3.
        assert error(got[-1], expected[-1]) < 1e-4
        # In other rows, AMX and fast bf16 instructions round the head's activations to the 8 bits of bf16.
        others = 5e-3 if auto.load_report.isa == "amx" or stored is None else 1e-4
        assert error(got[:-1], expected[:-1]) < others


@pytest.mark.parametrize("stored", ["F32", "BF16", "F16", "Q4_1", "Q8_0"])
def test_auto_depends_only_on_the_prompt(tmp_path: Path, stored: str) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf", matrix_type=stored)
    with candle_llama.load(path, device="cpu", threads=1) as one:
        for count in (1, 5, PHRASE, PHRASE + 1, SHORT_PROMPT, 200):
            prompt = ids(count)
            whole = one.logits(prompt)
            assert np.array_equal(one.logits(prompt, last=1), whole[-1:])
            greedy = one.generate(prompt, max_new_tokens=12, temperature=0, ignore_eos=True).token_ids
            assert greedy[0] == whole[-1].argmax()
            for threads in (2, 3):
                with candle_llama.load(path, device="cpu", threads=threads) as llm:
                    assert np.array_equal(llm.logits(prompt), whole)
                    batch = llm.generate([ids(9), prompt], max_new_tokens=12, temperature=0, ignore_eos=True)
                    assert batch[1].token_ids == greedy


@pytest.mark.parametrize("quantize", ["q8_0", "q4_0"])
@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantize_on_load_equals_a_quantised_file(
    tmp_path: Path, quantize: str, compute: str, dtype: str
) -> None:
    config = tiny.gguf_config(tie_word_embeddings=True)
    path = tiny.write_checkpoint(tmp_path / "model", config, dtype=dtype)
    candle_llama.quantize(path, tmp_path / "model.gguf", quantize, tokenizer=False)
    prompt = ids(150)
    with candle_llama.load(tmp_path / "model.gguf", device="cpu", compute=compute) as written:
        expected = written.logits(prompt)
    with candle_llama.load(path, device="cpu", compute=compute, quantize=quantize) as llm:
        assert set(llm.load_report.storage) == {"F32", quantize.upper()}
        assert np.array_equal(llm.logits(prompt), expected)
    estimate = candle_llama.estimate_memory(path, device="cpu", compute=compute, quantize=quantize)
    assert estimate.weights == llm.load_report.bytes


def test_quantize_on_load_keeps_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    odd = tiny.write_checkpoint(tmp_path / "odd", tiny.VARIANTS["odd-sizes"])
    with candle_llama.load(odd, device="cpu", quantize="q4_0") as llm:
        assert "F32" in llm.load_report.storage
        assert np.isfinite(llm.logits([1, 2, 3])).all()


def test_quantize_names_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.gguf_config())
    file = next(path.glob("*.safetensors"))
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, file)
    with pytest.raises(candle_llama.CheckpointError) as caught:
        candle_llama.load(path, device="cpu", quantize="q8_0")
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"


# The types round by at most 2^-24, 2^-11 and 2^-8, q8_0 by half a step of 1/127 of the largest; the large
# attention scores here multiply that by a few.
@pytest.mark.parametrize(
    ("kv_dtype", "least", "most"),
    [
        ("float32", 0, 1e-5),
        ("float16", 2**-12, 6 * 2**-11),
        ("bfloat16", 2**-9, 6 * 2**-8),
        ("q8_0", 2**-9, 8 * 2**-8),
    ],
)
def test_keys_and_values_are_rounded_to_their_type(
    tmp_path: Path, kv_dtype: Any, least: float, most: float
) -> None:
    config = tiny.gguf_config(head_dim=32) if kv_dtype == "q8_0" else tiny.gguf_config()
    path = tiny.write_checkpoint(tmp_path / "model", config)
    prompt = ids(200)
    expected = NumpyLlama.load(path).forward(prompt)
    with candle_llama.load(path, device="cpu", kv_dtype=kv_dtype) as llm:
        assert llm.load_report.kv_dtype == kv_dtype
        logits = llm.logits(prompt)
        assert least <= error(logits, expected) < most
        assert np.array_equal(pickle.loads(pickle.dumps(llm)).logits(prompt), logits)
    bits = {"float32": 32, "q8_0": 8.5}.get(kv_dtype, 16)
    half = candle_llama.estimate_memory(path, device="cpu").kv_cache
    assert candle_llama.estimate_memory(path, device="cpu", kv_dtype=kv_dtype).kv_cache == half * bits / 16


def test_q8_0_keeps_the_answers_of_one_request_whatever_runs_beside_it(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.gguf_config(head_dim=32))
    prompts = [ids(200), ids(130), ids(5), ids(200)[:150] + ids(20)]
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "logprobs": 2}
    with candle_llama.load(path, device="cpu", kv_dtype="q8_0", prefix_cache=False, threads=1) as llm:
        alone = [llm.generate(prompt, **options) for prompt in prompts]
    with candle_llama.load(path, device="cpu", kv_dtype="q8_0") as llm:
        for _ in range(2):
            for one, other in zip(alone, llm.generate(prompts, **options), strict=True):
                assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
        assert llm.metrics().prefix_hits > 0


def test_q8_0_needs_heads_of_whole_blocks(tiny: Path) -> None:
    for function in (candle_llama.load, candle_llama.estimate_memory):
        with pytest.raises(candle_llama.UnsupportedModelError, match=r"kv_dtype.*q8_0.*32 numbers.*head_dim"):
            function(tiny, device="cpu", kv_dtype="q8_0")


def test_auto_keeps_keys_and_values_in_float16_and_exact_in_float32(tiny: Path) -> None:
    for options, kv_dtype in (({}, "float16"), ({"compute": "exact"}, "float32")):
        with candle_llama.load(tiny, device="cpu", **options) as llm:
            assert llm.load_report.kv_dtype == kv_dtype


def test_bfloat16_holds_keys_that_float16_does_not(tmp_path: Path) -> None:
    config = tiny.gguf_config()
    tensors = tiny.tiny_tensors(config)
    # Keys grow and queries shrink by the same factor, so that the scores stay the same.
    for name in tensors:
        if "k_proj" in name:
            tensors[name] = tensors[name] * np.float32(2**20)
        if "q_proj" in name:
            tensors[name] = tensors[name] * np.float32(2**-20)
    path = tiny.write_checkpoint(tmp_path / "model", config, tensors=tensors)
    prompt = ids(100)
    expected = NumpyLlama.load(path).forward(prompt)
    with candle_llama.load(path, device="cpu") as llm:
        assert not np.isfinite(llm.logits(prompt)).all()
    with candle_llama.load(path, device="cpu", kv_dtype="bfloat16") as llm:
        assert error(llm.logits(prompt), expected) < 6 * 2**-8


def test_candle_keeps_keys_and_values_in_the_type_it_computes_with(tiny: Path) -> None:
    with candle_llama.load(tiny, device="cpu", engine="candle", kv_dtype="float32") as llm:
        assert llm.load_report.kv_dtype == "float32"
    for kv_dtype in ("bfloat16", "q8_0"):
        with pytest.raises(candle_llama.UnsupportedModelError, match=rf"kv_dtype.*{kv_dtype}.*float32.*cpu"):
            candle_llama.load(tiny, device="cpu", engine="candle", kv_dtype=kv_dtype)


def test_bad_choices_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="quantize"):
        candle_llama.load(tiny, quantize="q3_k")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantize"):
        candle_llama.load(tiny, quantize="q8_0", dtype="float32")
    with pytest.raises(candle_llama.UnsupportedModelError, match="cpu"):
        candle_llama.load(tiny, quantize="q8_0", engine="candle")
    with pytest.raises(ValueError, match="kv_dtype"):
        candle_llama.load(tiny, kv_dtype="q4_0")  # type: ignore[arg-type]
    for kv_dtype in ("float16", "bfloat16", "q8_0"):
        for function in (candle_llama.load, candle_llama.estimate_memory):
            with pytest.raises(ValueError, match=f'kv_dtype.*{kv_dtype}.*compute="exact"'):
                function(tiny, kv_dtype=kv_dtype, compute="exact")


def test_the_candle_engine_on_the_cpu_computes_float16_checkpoints_in_float32(tmp_path):
    config = tiny.tiny_config()
    tensors = tiny.tiny_tensors(config, 0, None)
    # The product of gate and up exceeds 65504, float16's largest number.
    for name in tensors:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensors[name] = tensors[name] * 2000
    path = tiny.write_checkpoint(tmp_path / "m", config, dtype="float16", tensors=tensors)
    ids = [5, 6, 7, 8]
    with (
        candle_llama.load(path, device="cpu", engine="candle") as candle,
        candle_llama.load(path, device="cpu", compute="exact") as exact,
    ):
        assert any("converted to F32" in note for note in candle.load_report.notes)
        assert candle.load_report.kv_dtype == "float32"
        np.testing.assert_allclose(candle.logits(ids), exact.logits(ids), rtol=1e-3, atol=1e-3)
