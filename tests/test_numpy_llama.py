"""The NumPy model and its checkpoint reader, against independent implementations."""

import math
import runpy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer

import tiny
from candle_llama.bench import numpy_llama, read_checkpoint
from candle_llama.bench.numpy_llama import NumpyLlama
from candle_llama.bench.numpy_rope import inv_freq
from candle_llama.bench.storage_types import STORAGE_TYPES
from candle_llama.bench.synthetic import to_bfloat16

Array = NDArray[Any]

# Some types that the `gguf` package writes; the golden blocks below cover all types.
GGUF_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]


def random_ids(config: tiny.Config, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, config["vocab_size"], count).tolist()


def model(config: tiny.Config, dtype: type = np.float64, **kwargs: Any) -> NumpyLlama:
    return NumpyLlama(config, tiny.tiny_tensors(config, **kwargs), dtype)


def logits_by_loops(config: tiny.Config, tensors: dict[str, Array], ids: list[int]) -> Array:
    """The model written differently: no cache, one position and head at a time, complex rotations."""
    weights = {name: values.astype(np.float64) for name, values in tensors.items()}
    heads = config["num_attention_heads"]
    group = heads // (config.get("num_key_value_heads") or heads)
    size = tiny.head_dim(config)
    theta = config["rope_theta"]
    turn = [np.exp(1j * p * theta ** (-2 * np.arange(size // 2) / size)) for p in range(len(ids))]

    def norm(row: Array, name: str) -> Array:
        return row / math.sqrt(float(row @ row) / len(row) + config["rms_norm_eps"]) * weights[name]

    def rotated(head: Array, position: int) -> Array:
        pairs = (head[: size // 2] + 1j * head[size // 2 :]) * turn[position]
        return np.concatenate([pairs.real, pairs.imag])

    rows = [weights["model.embed_tokens.weight"][i] for i in ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = [norm(row, prefix + "input_layernorm.weight") for row in rows]

        def project(name: str, row: Array, prefix: str = prefix) -> list[Array]:
            return list((weights[f"{prefix}self_attn.{name}_proj.weight"] @ row).reshape(-1, size))

        keys = [[rotated(head, p) for head in project("k", row)] for p, row in enumerate(normed)]
        values = [project("v", row) for row in normed]
        for p, row in enumerate(normed):
            mixed = []
            for h, query in enumerate(project("q", row)):
                scores = [rotated(query, p) @ keys[s][h // group] / math.sqrt(size) for s in range(p + 1)]
                shares = [math.exp(score - max(scores)) for score in scores]
                mixed.append(
                    sum(share * values[s][h // group] for s, share in enumerate(shares)) / sum(shares)
                )
            rows[p] = rows[p] + weights[prefix + "self_attn.o_proj.weight"] @ np.concatenate(mixed)
            x = norm(rows[p], prefix + "post_attention_layernorm.weight")
            gate = weights[prefix + "mlp.gate_proj.weight"] @ x
            up = weights[prefix + "mlp.up_proj.weight"] @ x
            rows[p] = rows[p] + weights[prefix + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return np.stack([head @ norm(row, "model.norm.weight") for row in rows])


@pytest.mark.parametrize("name", ["gqa-tied", "mha-untied", "mha-implied", "mqa", "head-dim-wider"])
def test_logits_equal_those_of_loops(name: str) -> None:
    config = tiny.VARIANTS[name]
    ids = random_ids(config, 24)
    expected = logits_by_loops(config, tiny.tiny_tensors(config), ids)
    # The loops compute rotary frequencies in float64, the model in float32, as transformers does.
    assert np.abs(model(config).forward(ids) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", sorted(tiny.VARIANTS))
def test_float32_is_close_to_float64(name: str) -> None:
    config = tiny.VARIANTS[name]
    ids = random_ids(config, 200)
    exact = model(config).forward(ids)
    single = model(config, np.float32).forward(ids)
    assert single.dtype == np.float32
    # A tenth of what the engines are allowed to differ from this model.
    assert np.abs(single - exact).max() <= 2e-5 * np.abs(exact).max()


def test_decode_after_prefill_equals_one_forward() -> None:
    config = tiny.VARIANTS["llama3-rope"]
    ids = random_ids(config, 30)
    whole = model(config).forward(ids)
    cached = model(config)
    rows = [cached.forward(ids[:17])] + [cached.forward([ids[i]], start=i) for i in range(17, 30)]
    np.testing.assert_allclose(np.concatenate(rows), whole, rtol=0, atol=1e-12)


def test_start_discards_the_cached_positions_after_it() -> None:
    config = tiny.VARIANTS["gqa-tied"]
    ids = random_ids(config, 12)
    rewound = model(config)
    rewound.forward([*ids[:8], 5, 6, 7])
    np.testing.assert_allclose(
        rewound.forward(ids[8:], start=8), model(config).forward(ids)[8:], rtol=0, atol=1e-12
    )
    rewound.reset()
    np.testing.assert_array_equal(rewound.forward(ids), model(config).forward(ids))


def test_chunks_do_not_change_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.VARIANTS["mqa"]
    ids = random_ids(config, 23)
    whole = model(config).forward(ids)
    monkeypatch.setattr(numpy_llama, "CHUNK_ROWS", 5)
    np.testing.assert_allclose(model(config).forward(ids), whole, rtol=0, atol=1e-12)


def test_last_only_is_the_last_row() -> None:
    config = tiny.VARIANTS["mha-untied"]
    ids = random_ids(config, 9)
    last = model(config).forward(ids, last_only=True)
    assert last.shape == (1, config["vocab_size"])
    np.testing.assert_allclose(last[0], model(config).forward(ids)[-1], rtol=0, atol=1e-12)


def test_generate_chooses_the_largest_logit_each_time() -> None:
    config = tiny.VARIANTS["gqa-tied"]
    prompt = random_ids(config, 6)
    llama = model(config)
    output = llama.generate(prompt, 10)
    assert len(output) == 10
    logits = model(config).forward(prompt + output)
    assert output == logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()
    assert llama.generate(prompt, 10) == output, "a second call starts afresh"
    assert llama.generate(prompt, 0) == []


def test_missing_head_is_the_embedding_whatever_the_flag_says() -> None:
    config = tiny.tiny_config(tie_word_embeddings=False)
    ids = random_ids(config, 5)
    tensors = tiny.tiny_tensors(config, lm_head=False)
    with_copy = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    np.testing.assert_array_equal(
        NumpyLlama(config, tensors).forward(ids), NumpyLlama(config, with_copy).forward(ids)
    )


def test_both_spellings_of_the_config_agree() -> None:
    older = tiny.tiny_config(rope_theta=50000.0, rope_scaling=tiny.LLAMA3_ROPE)
    oldest = tiny.VARIANTS["llama3-rope-older-key"] | {"rope_theta": 50000.0}
    newer = tiny.tiny_config_v5({"rope_theta": 50000.0, **tiny.LLAMA3_ROPE})
    ids = random_ids(older, 40)
    logits = [model(config).forward(ids) for config in (older, oldest, newer)]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])
    plain = model(tiny.tiny_config(rope_theta=50000.0)).forward(ids)
    assert np.abs(plain - logits[0]).max() > 0.01, "the scaling matters"


def test_llama3_frequencies_by_wavelength() -> None:
    # Llama 3.2's own parameters; the rule is written with wavelengths, as its authors do.
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = []
    for i in range(32):
        frequency = 500000.0 ** (-i / 32)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192 / 1.0:
            frequency /= 32.0
        elif wavelength >= 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 32.0 + smooth * frequency
        expected.append(frequency)
    np.testing.assert_allclose(inv_freq({"rope_parameters": rope}, 64), expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
    ],
)
def test_unsupported_configs_are_refused(changes: tiny.Config, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model(tiny.tiny_config(**changes))


def test_bad_tokens_and_gaps_are_refused() -> None:
    llama = model(tiny.VARIANTS["gqa-tied"])
    with pytest.raises(ValueError, match="non-empty"):
        llama.forward([])
    with pytest.raises(ValueError, match="0 positions are cached"):
        llama.forward([1], start=1)
    for token in (-1, tiny.VOCAB_SIZE):
        with pytest.raises(IndexError):
            llama.forward([token])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folder_is_read_in_every_dtype_and_sharded(tmp_path: Path, dtype: str) -> None:
    config = tiny.VARIANTS["mha-untied"]
    single = tiny.write_checkpoint(tmp_path / "single", config, dtype=dtype)
    sharded = tiny.write_checkpoint(tmp_path / "sharded", config, dtype=dtype, shards=3)
    read_config, tensors = read_checkpoint.read_checkpoint(single)
    assert read_config["num_key_value_heads"] == 4
    original = tiny.tiny_tensors(config)
    assert set(tensors) == set(original)
    # Half an ulp of each type, relative to the value.
    bound = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    _, from_shards = read_checkpoint.read_checkpoint(sharded)
    for name, values in tensors.items():
        assert values.dtype == np.float32
        assert (np.abs(values - original[name]) <= bound * np.abs(original[name]) + 1e-7).all()
        np.testing.assert_array_equal(values, from_shards[name])
    with safe_open(single / "model.safetensors", framework="np") as file:
        assert set(file.keys()) == set(original)
        assert file.get_slice("lm_head.weight").get_shape() == list(original["lm_head.weight"].shape)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127), min_size=1))
def test_bfloat16_rounds_to_the_nearest(values: list[float]) -> None:
    exact = np.array(values, dtype=np.float32)
    rounded = gguf.quantize(exact, gguf.GGMLQuantizationType.BF16).view(np.uint16)
    normal = np.abs(exact) >= np.finfo(np.float32).tiny  # the package flushes smaller numbers to zero
    np.testing.assert_array_equal(to_bfloat16(exact)[normal], rounded[normal])


@pytest.mark.parametrize("type_name", GGUF_TYPES)
def test_blocks_are_decoded_as_the_gguf_package_does(tmp_path: Path, type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    values = np.random.default_rng(3).standard_normal((7, 96)).astype(np.float32)
    encoded = gguf.quantize(values, kind)
    path = tmp_path / "blocks"
    path.write_bytes(b"head" + encoded.tobytes())
    stored = read_checkpoint.StoredTensor(path, 4, type_name, (7, 96))
    np.testing.assert_array_equal(stored.read(), gguf.dequantize(encoded, kind).reshape(7, 96))
    assert stored.read(np.float64).dtype == np.float64
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        stored.read()


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4, "head_dim": 32}, {"num_key_value_heads": 1}]
)
def test_gguf_holds_the_same_model_as_the_folder(tmp_path: Path, changes: tiny.Config) -> None:
    config = tiny.gguf_config(**changes)
    ids = random_ids(config, 20)
    folder = NumpyLlama.load(tiny.write_checkpoint(tmp_path / "folder", config))
    file = NumpyLlama.load(tiny.write_gguf(tmp_path / "model.gguf", config))
    # GGUF stores rms_norm_eps as float32; nothing else is rounded.
    np.testing.assert_allclose(file.forward(ids), folder.forward(ids), rtol=0, atol=1e-5)
    assert file.config["num_key_value_heads"] == config["num_key_value_heads"]
    assert file.config["tie_word_embeddings"] is True
    assert file.config["eos_token_id"] == tiny.EOS


def test_gguf_with_a_head_is_not_tied(tmp_path: Path) -> None:
    config = tiny.gguf_config(tie_word_embeddings=False)
    llama = NumpyLlama.load(tiny.write_gguf(tmp_path / "model.gguf", config))
    assert llama.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(llama.lm_head, tiny.tiny_tensors(config)["lm_head.weight"])


def test_gguf_rope_factors_replace_llama3_scaling(tmp_path: Path) -> None:
    scaled = tiny.gguf_config(rope_scaling=tiny.LLAMA3_ROPE)
    factors = inv_freq({**scaled, "rope_scaling": None}, 16) / inv_freq(scaled, 16)
    assert factors.min() == 1.0
    assert factors.max() == pytest.approx(8.0)
    ids = random_ids(scaled, 50)
    folder = NumpyLlama.load(tiny.write_checkpoint(tmp_path / "folder", scaled))
    file = NumpyLlama.load(tiny.write_gguf(tmp_path / "model.gguf", scaled, rope_factors=factors))
    np.testing.assert_allclose(file.forward(ids), folder.forward(ids), rtol=0, atol=1e-4)


def test_gguf_metadata_equals_the_gguf_packages(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf", add_bos=True)
    metadata = read_checkpoint.read_gguf_metadata(path)
    fields = gguf.GGUFReader(path).fields
    expected = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert metadata == expected
    assert metadata["tokenizer.ggml.tokens"] == tiny.VOCABULARY


@pytest.mark.parametrize("size", [3, 9, 20, 100, 2000, 20000])
def test_a_truncated_gguf_header_is_an_error(tmp_path: Path, size: int) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"truncated|not a GGUF"):
        NumpyLlama.load(path)


def test_missing_weights_are_a_missing_file(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        NumpyLlama.load(folder)


def test_tiny_tokenizer_reads_any_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny.write_checkpoint(tmp_path / "model") / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == tiny.VOCAB_SIZE
    text = "hello world, thé 😀\n\nand 100 things"
    encoding = tokenizer.encode(text + "<|end|>")
    assert encoding.ids[0] == tiny.BOS
    assert encoding.ids[-1] == tiny.EOS
    assert tokenizer.decode(encoding.ids) == text
    assert {"hello", "Ġworld", "and", "ðŁĺĢ"} <= set(encoding.tokens)


def test_storage_types_are_dequantised_as_by_the_gguf_package() -> None:
    golden = Path(__file__).parent.parent / "crates/kernels/tests/golden/blocks.txt"
    script = runpy.run_path(str(golden.with_suffix(".py")))
    assert set(script["ORDER"]) == set(STORAGE_TYPES)
    assert script["lines"]() == golden.read_text(encoding="ascii"), f"run {golden.with_suffix('.py')}"
    for line in golden.read_text(encoding="ascii").splitlines():
        name, stored, floats = line.split(" ")
        storage = STORAGE_TYPES[name]
        got = storage.decode(np.frombuffer(bytes.fromhex(stored), dtype=storage.block))
        assert got.astype("<f4").tobytes().hex() == floats, name
