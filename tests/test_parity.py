"""All engines against the NumPy model: every variant of the config, every storage type, every row."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import candle_llama
import tiny
from accelerators import accelerators
from candle_llama.bench.numpy_llama import NumpyLlama
from candle_llama.bench.numpy_rope import inv_freq

# "tensor-float32" has all weights as Candle's float32 tensors, as on a GPU with compute="exact". "tensor
# cuda:0" is the tensor engine on that device, if this build and this machine have one.
ENGINES = ["cpu", "tensor", "tensor-float32", "candle"] + [
    f"{engine} {device}" for device in accelerators() for engine in ("tensor", "candle")
]
# Those that run every config.
OURS = [engine for engine in ENGINES if not engine.startswith("candle")]
GGUF_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
# The `gguf` package cannot write these; the files hold random blocks.
RANDOM_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]

# Largest difference, relative to the largest |logit|: some tens of float32 roundings, each in a sum of a few
# hundred numbers.
BOUND = 2e-4
# Two logits that are closer than this count as a tie for greedy decoding.
NEAR_TIE = 1e-3

# The variants that Candle's Llama cannot express.
OURS_ONLY = {"head-dim-wider", "odd-sizes", "attention-bias", "mlp-bias", "all-biases"} | {
    name
    for name in tiny.VARIANTS
    if any(word in name for word in ("gelu", "linear-rope", "dynamic-rope", "yarn-rope"))
}


def load(path: Path, engine: str, **options: Any) -> candle_llama.Llama:
    with warnings.catch_warnings():
        if engine != "cpu":
            # It warns that it converts types that Candle cannot multiply on the CPU.
            warnings.simplefilter("ignore", UserWarning)
        return candle_llama.load(path, **{**where(engine), "compute": "exact", **options})


def where(engine: str) -> dict[str, str]:
    """The `engine=`, `device=` and `dtype=` that one of ENGINES means."""
    name, _, device = engine.partition(" ")
    name, _, dtype = name.partition("-")
    return {"engine": name, "device": device or "cpu", "dtype": dtype or "auto"}


def random_ids(vocab_size: int, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def assert_near(logits: NDArray[Any], expected: NDArray[Any]) -> None:
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    assert np.isfinite(logits).all()
    # Row by row: a row of large logits must not hide an error in another.
    error = np.abs(logits - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert error.max() <= BOUND, f"row {error.argmax()} of {len(error)} differs by {error.max():.2e}"


def assert_same_model(llm: candle_llama.Llama, reference: NumpyLlama, tokens: int = 40) -> None:
    """Compares all rows, the last rows, and a greedy continuation."""
    ids = random_ids(reference.config["vocab_size"], tokens)
    expected = reference.forward(ids)
    assert_near(llm.logits(ids), expected)
    assert_near(llm.logits(ids, last=3), expected[-3:])
    assert_near(llm.logits(ids[:1]), expected[:1])


def assert_same_continuation(llm: candle_llama.Llama, reference: NumpyLlama) -> None:
    """Every token must be the reference's most likely one after the same tokens, up to near-ties."""
    prompt = random_ids(reference.config["vocab_size"], 7, seed=2)
    output = llm.generate(prompt, max_new_tokens=24, temperature=0, ignore_eos=True).token_ids
    assert len(output) == 24
    last = reference.forward(prompt, last_only=True)
    rows = np.concatenate([last, reference.forward(output, start=len(prompt))[:-1]])
    for step, (row, token) in enumerate(zip(rows, output, strict=True)):
        missing = row.max() - row[token]
        assert missing <= NEAR_TIE * np.abs(row).max(), f"token {step} is {token}, not {row.argmax()}"


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        (name, engine)
        for name in sorted(tiny.VARIANTS)
        for engine in ENGINES
        if engine in OURS or name not in OURS_ONLY
    ],
)
def test_float32_checkpoint_equals_numpy(tmp_path: Path, name: str, engine: str) -> None:
    config = tiny.VARIANTS[name]
    has_tokenizer = config["vocab_size"] == tiny.VOCAB_SIZE
    path = tiny.write_checkpoint(tmp_path / "model", config, tokenizer=has_tokenizer)
    reference = NumpyLlama.load(path)
    with load(path, engine) as llm:
        assert_same_model(llm, reference)
        if has_tokenizer:
            assert_same_continuation(llm, reference)


@pytest.mark.parametrize("name", sorted(OURS_ONLY))
def test_candle_refuses_models_that_it_cannot_express(tmp_path: Path, name: str) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.VARIANTS[name])
    with pytest.raises(candle_llama.UnsupportedModelError, match="cpu"):
        load(path, "candle")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_storage_equals_numpy_on_the_same_weights(
    tmp_path: Path, dtype: str, engine: str
) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.VARIANTS["mha-untied"], dtype=dtype, shards=2)
    reference = NumpyLlama.load(path)
    with load(path, engine) as llm:
        assert_same_model(llm, reference)
        assert_same_continuation(llm, reference)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("type_name", GGUF_TYPES)
def test_gguf_storage_equals_numpy_on_the_same_weights(tmp_path: Path, type_name: str, engine: str) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf", matrix_type=type_name)
    reference = NumpyLlama.load(path)
    with load(path, engine) as llm:
        assert_same_model(llm, reference)
        assert_same_continuation(llm, reference)


@pytest.mark.parametrize("type_name", RANDOM_TYPES)
def test_random_blocks_equal_numpy_on_the_same_weights(tmp_path: Path, type_name: str) -> None:
    config = tiny.gguf_config(hidden_size=256, intermediate_size=512)
    path = tiny.write_gguf(tmp_path / "model.gguf", config, matrix_type=type_name)
    reference = NumpyLlama.load(path)
    with load(path, "cpu") as llm:
        assert set(llm.load_report.storage) == {"F32", type_name}
        assert_same_model(llm, reference)
        assert_same_continuation(llm, reference)
    for engine in ("tensor", "tensor-float32", "candle"):
        with load(path, engine) as llm:
            assert_same_model(llm, reference)


@pytest.mark.parametrize("engine", ENGINES)
def test_gguf_of_mixed_types_with_a_head_equals_numpy(tmp_path: Path, engine: str) -> None:
    config = tiny.gguf_config(num_key_value_heads=1, tie_word_embeddings=False)
    path = tiny.write_gguf(tmp_path / "model.gguf", config, matrix_type="Q4_1", embedding_type="Q8_0")
    with load(path, engine) as llm:
        assert llm.load_report.lm_head == "separate"
        assert_same_model(llm, NumpyLlama.load(path))


def test_gguf_rope_factors_equal_numpy(tmp_path: Path) -> None:
    config = tiny.gguf_config()
    factors = inv_freq(config, 16) / inv_freq({**config, "rope_scaling": tiny.LLAMA3_ROPE}, 16)
    path = tiny.write_gguf(tmp_path / "model.gguf", config, rope_factors=factors)
    reference = NumpyLlama.load(path)
    ids = random_ids(tiny.VOCAB_SIZE, 90)
    plain = NumpyLlama.load(tiny.write_gguf(tmp_path / "plain.gguf", config)).forward(ids)
    assert np.abs(plain - reference.forward(ids)).max() > 0.1, "the factors matter"
    for engine in OURS:
        with load(path, engine) as llm:
            assert_near(llm.logits(ids), reference.forward(ids))


@pytest.mark.parametrize("engine", ENGINES)
def test_gguf_rope_factors_of_llama_3_equal_numpy(tmp_path: Path, engine: str) -> None:
    plain = tiny.gguf_config(rope_theta=500_000.0, max_position_embeddings=512)
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = inv_freq(plain, 16) / inv_freq({**plain, "rope_scaling": scaling}, 16)
    path = tiny.write_gguf(tmp_path / "model.gguf", plain, rope_factors=factors)
    with load(path, engine) as llm:
        assert_same_model(llm, NumpyLlama.load(path))


def test_candle_refuses_other_rope_factors(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf", rope_factors=np.linspace(1, 8, 8))
    with pytest.raises(candle_llama.UnsupportedModelError, match=r"rope_freqs\.weight.*cpu"):
        load(path, "candle")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        {"rope_scaling": tiny.YARN_ROPE},
        {"attention_bias": True},
        {"mlp_bias": True, "num_key_value_heads": 1},
        {"head_dim": 24},
    ],
)
def test_gguf_metadata_equals_config_json(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny.gguf_config(**changes)
    ids = random_ids(tiny.VOCAB_SIZE, 90)
    plain = NumpyLlama(tiny.gguf_config(), tiny.tiny_tensors(tiny.gguf_config())).forward(ids)
    expected = NumpyLlama(config, tiny.tiny_tensors(config)).forward(ids)
    assert np.abs(plain - expected).max() > 0.1, "the change matters"
    path = tiny.write_gguf(tmp_path / "model.gguf", config)
    assert_near(NumpyLlama.load(path).forward(ids), expected)
    for engine in OURS:
        with load(path, engine) as llm:
            assert_near(llm.logits(ids), expected)


@pytest.mark.parametrize("engine", OURS)
def test_a_gguf_file_may_have_only_some_biases(tmp_path: Path, engine: str) -> None:
    config = tiny.gguf_config(attention_bias=True)
    path = tiny.write_gguf(tmp_path / "model.gguf", config, leave_out="attn_output.bias")
    with load(path, engine) as llm:
        assert_same_model(llm, NumpyLlama.load(path))


@pytest.mark.parametrize("engine", OURS)
def test_dynamic_frequencies_depend_on_the_prompt_and_do_not_change(tmp_path: Path, engine: str) -> None:
    config = tiny.VARIANTS["dynamic-rope"]
    path = tiny.write_checkpoint(tmp_path / "model", config)
    reference = NumpyLlama.load(path)
    with load(path, engine) as llm:
        with pytest.raises(candle_llama.ContextLengthError) as raised:
            llm.generate([1] * 200)
        assert raised.value.context_length == 8 * 16
        long, short = random_ids(tiny.VOCAB_SIZE, 100), random_ids(tiny.VOCAB_SIZE, 10)
        for prompt in (long, short):
            output = llm.generate(prompt, max_new_tokens=20, temperature=0, ignore_eos=True).token_ids
            reference.forward(prompt)
            assert output[0] == reference.forward(prompt)[-1].argmax()
            rows = reference.forward(output, start=len(prompt))
            chosen = rows[np.arange(19), output[1:]]
            assert (rows[:-1].max(axis=1) - chosen <= NEAR_TIE * np.abs(rows[:-1]).max()).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_missing_head_of_an_untied_config_is_the_embedding(tmp_path: Path, engine: str) -> None:
    config = tiny.tiny_config(tie_word_embeddings=False)
    path = tiny.write_checkpoint(tmp_path / "model", config, lm_head=False)
    with pytest.warns(UserWarning, match="lm_head"):
        llm = candle_llama.load(path, **where(engine), compute="exact")
    with llm:
        assert llm.load_report.lm_head == "tied"
        assert_same_model(llm, NumpyLlama.load(path))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_that_differs_from_the_embedding_is_used_though_tied(tmp_path: Path, engine: str) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.tiny_config(), lm_head=True)
    with pytest.warns(UserWarning, match="lm_head"):
        llm = candle_llama.load(path, **where(engine), compute="exact")
    with llm:
        assert llm.load_report.lm_head == "separate"
        assert_same_model(llm, NumpyLlama.load(path))


@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("name", ["gqa-tied", "llama3-rope"])
def test_a_prompt_of_several_chunks_equals_numpy(tmp_path: Path, name: str, engine: str) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.VARIANTS[name])
    ids = random_ids(tiny.VOCAB_SIZE, 700)
    with load(path, engine) as llm:
        assert_near(llm.logits(ids), NumpyLlama.load(path).forward(ids))


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("type_name", ["F32", "BF16", "Q8_0", "Q4_1"])
def test_threads_do_not_change_a_bit(tmp_path: Path, type_name: str, compute: str) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf", matrix_type=type_name)
    ids = random_ids(tiny.VOCAB_SIZE, 700)
    logits = []
    for threads in (1, 2, 3):
        with load(path, "cpu", compute=compute, threads=threads) as llm:
            logits.append(llm.logits(ids))
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


@pytest.mark.parametrize("type_name", ["F32", "BF16", "Q4_0"])
def test_a_row_does_not_depend_on_the_rows_computed_with_it(tmp_path: Path, type_name: str) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf", matrix_type=type_name)
    ids = random_ids(tiny.VOCAB_SIZE, 600)
    with load(path, "cpu") as llm:
        rows = llm.logits(ids)
        np.testing.assert_array_equal(llm.logits(ids, last=5), rows[-5:])
        for length in (1, 2, 3, 17, 64, 129, 513):
            np.testing.assert_array_equal(llm.logits(ids[:length], last=1)[0], rows[length - 1])


@pytest.mark.parametrize("engine", ENGINES)
def test_demo_equals_numpy(demo: Path, engine: str) -> None:
    reference = NumpyLlama.load(demo)
    with load(demo, engine, context_length=128) as llm:
        assert_same_model(llm, reference, tokens=12)
