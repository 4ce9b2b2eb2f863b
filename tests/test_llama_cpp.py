"""llama.cpp loads the files of `quantize` and agrees with us; skipped if llama-cpp-python is missing."""

import ctypes
import platform
import runpy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import candle_llama
import test_quantize
import test_quantize_tokenizers
import tiny
from candle_llama.bench.synthetic import write_synthetic

llama_cpp = pytest.importorskip("llama_cpp")

F32 = 0
# Largest difference, relative to the largest |logit|. llama.cpp rounds activations to 8 bits if weights are
# quantised, and to 16 bits for 16-bit weights; its F32 is as exact as ours.
BOUNDS = {
    "f32": 1e-4,
    "f16": 0.005,
    "bf16": 0.03,
    "q8_0": 0.05,
    "q4_0": 0.05,
    "q4_1": 0.1,
    "q5_0": 0.05,
    "q5_1": 0.05,
}
TEXTS = [
    "Hello world",
    " the  world\n\n and 12345.67 things, don't they?\t",
    "naïve café, Русский 日本語 😀👍🏽",
    "fn main() { a[0] += 1; }",
    "a",
]


@contextmanager
def peer(path: Path, **options: Any) -> Iterator[Any]:
    """The file loaded by llama.cpp, with keys and values in float32."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=512,
        logits_all=True,
        n_threads=2,
        verbose=False,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        **options,
    )
    try:
        yield model
    finally:
        model.close()


def peer_logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def ids_of(vocab_size: int, count: int = 40) -> list[int]:
    return np.random.default_rng(3).integers(0, vocab_size, count).tolist()


@pytest.mark.parametrize("name", sorted(set(tiny.VARIANTS) - set(test_quantize.INEXPRESSIBLE)))
def test_float32_files_of_every_variant_agree(tmp_path: Path, name: str) -> None:
    config = tiny.VARIANTS[name]
    has_tokenizer = config["vocab_size"] == tiny.VOCAB_SIZE
    folder = tiny.write_checkpoint(tmp_path / "model", config, tokenizer=has_tokenizer)
    candle_llama.quantize(folder, tmp_path / "out.gguf", "f32", tokenizer=has_tokenizer)
    ids = ids_of(config["vocab_size"])
    with test_quantize.load(folder) as llm, peer(tmp_path / "out.gguf") as other:
        assert relative_error(peer_logits(other, ids), llm.logits(ids)) <= BOUNDS["f32"]


@pytest.mark.parametrize("dtype", test_quantize.TYPES)
def test_every_type_agrees(tmp_path: Path, dtype: str) -> None:
    config = tiny.gguf_config(hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    folder = tiny.write_checkpoint(tmp_path / "model", config)
    candle_llama.quantize(folder, tmp_path / "out.gguf", dtype)
    ids = ids_of(tiny.VOCAB_SIZE)
    with test_quantize.load(tmp_path / "out.gguf") as llm, peer(tmp_path / "out.gguf") as other:
        assert relative_error(peer_logits(other, ids), llm.logits(ids)) <= BOUNDS[dtype]


# Models with every rule for the types of a mixture, as changes to `tiny.gguf_config`.
MIXED_MODELS: dict[str, dict[str, Any]] = {
    "untied": {"num_hidden_layers": 17, "num_attention_heads": 8, "tie_word_embeddings": False},
    "tied": {"num_key_value_heads": 1, "attention_bias": True},
    "few-heads": {"num_hidden_layers": 9},
    "rows-of-96": {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 9},
    "rows-of-96-untied": {"hidden_size": 96, "intermediate_size": 256, "tie_word_embeddings": False},
    "rows-of-40": {"hidden_size": 40, "intermediate_size": 72},
    "70b": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 80,
        "num_key_value_heads": 1,
    },
    "65b": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 80,
        "num_key_value_heads": 4,
    },
}


def peer_quantizes(source: Path, target: Path, file_type: int) -> None:
    """Has llama.cpp quantise a file."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 2
    # The package's own callback decodes messages, which llama.cpp cuts inside of a character.
    silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(silent, None)
    try:
        paths = (str(path).encode() for path in (source, target))
        assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) == 0
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere C compilers fuse products and sums"
)
@pytest.mark.parametrize("model", MIXED_MODELS)
def test_mixtures_are_llama_cpp_s_own_files(tmp_path: Path, model: str) -> None:
    """The same tensors with the same types and bytes, from a folder and from a GGUF file."""
    config = tiny.gguf_config(**{"hidden_size": 256, "intermediate_size": 512, **MIXED_MODELS[model]})
    folder = tiny.write_checkpoint(tmp_path / "model", config)
    candle_llama.quantize(folder, tmp_path / "f32.gguf", "f32")
    for mixture in test_quantize.MIXTURES:
        file_type = gguf.LlamaFileType[f"MOSTLY_{mixture.upper()}"]
        peer_quantizes(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", file_type)
        theirs = gguf.GGUFReader(tmp_path / "theirs.gguf")
        expected = {tensor.name: tensor for tensor in theirs.tensors}
        for origin in (folder, tmp_path / "f32.gguf"):
            candle_llama.quantize(origin, tmp_path / "ours.gguf", mixture, force=True)
            ours = gguf.GGUFReader(tmp_path / "ours.gguf")
            assert ours.fields["general.file_type"].contents() == file_type
            assert theirs.fields["general.file_type"].contents() == file_type
            assert {tensor.name for tensor in ours.tensors} == set(expected)
            for tensor in ours.tensors:
                peer_tensor = expected[tensor.name]
                assert tensor.tensor_type == peer_tensor.tensor_type, (mixture, tensor.name)
                assert tensor.data.tobytes() == peer_tensor.data.tobytes(), (mixture, tensor.name)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere C compilers fuse products and sums"
)
def test_golden_blocks_of_the_k_types_are_what_the_script_writes() -> None:
    golden = Path(__file__).parent.parent / "crates/kernels/tests/golden/k_quantized.txt"
    script = runpy.run_path(str(golden.with_suffix(".py")))
    assert script["lines"]() == golden.read_text(encoding="ascii"), f"run {golden.with_suffix('.py')}"


@pytest.mark.parametrize("mixture", test_quantize.MIXTURES)
def test_files_of_every_mixture_agree(tmp_path: Path, mixture: str) -> None:
    config = tiny.gguf_config(hidden_size=256, intermediate_size=512, tie_word_embeddings=False)
    folder = tiny.write_checkpoint(tmp_path / "model", config)
    candle_llama.quantize(folder, tmp_path / "out.gguf", mixture)
    ids = ids_of(tiny.VOCAB_SIZE)
    with test_quantize.load(tmp_path / "out.gguf") as llm, peer(tmp_path / "out.gguf") as other:
        assert relative_error(peer_logits(other, ids), llm.logits(ids)) <= 0.1


def assert_same_ids(path: Path, texts: list[str]) -> None:
    tokenizer = candle_llama.load_tokenizer(path)
    with peer(path, vocab_only=True) as other:
        for text in texts:
            got = other.tokenize(text.encode(), add_bos=True, special=True)
            assert got == tokenizer.encode(text), text


def test_byte_level_tokenizers_agree(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", tiny.tiny_config(vocab_size=tiny.VOCAB_SIZE + 5))
    candle_llama.quantize(folder, tmp_path / "out.gguf")
    assert_same_ids(tmp_path / "out.gguf", [*TEXTS, "<|im_start|>user\nthe world<|im_end|>\n"])


@pytest.mark.parametrize("metaspace", [None, "always"])
def test_sentence_piece_tokenizers_agree(tmp_path: Path, metaspace: str | None) -> None:
    tokenizer = test_quantize_tokenizers.llama_2_tokenizer(metaspace)
    folder = test_quantize_tokenizers.llama_2(tmp_path / "model", tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        candle_llama.quantize(folder, tmp_path / "out.gguf")
    assert_same_ids(tmp_path / "out.gguf", [*TEXTS, *filter(None, test_quantize_tokenizers.SPOKEN)])


def test_a_file_without_a_tokenizer_is_loaded(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    candle_llama.quantize(folder, tmp_path / "out.gguf", "f32", tokenizer=False)
    ids = ids_of(tiny.VOCAB_SIZE)
    with test_quantize.load(folder) as llm, peer(tmp_path / "out.gguf") as other:
        assert relative_error(peer_logits(other, ids), llm.logits(ids)) <= BOUNDS["f32"]


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0"])
def test_synthetic_files_are_loaded_and_agree(tmp_path: Path, dtype: str) -> None:
    path = write_synthetic(f"smollm2-135m:{dtype}", cache_dir=tmp_path)
    assert_same_ids(path, TEXTS)
    ids = ids_of(49152, 12)
    with test_quantize.load(path) as llm, peer(path) as other:
        assert relative_error(peer_logits(other, ids), llm.logits(ids)) <= 0.1


@pytest.mark.parametrize("dtype", ["f32", "q8_0", "q4_0"])
def test_the_demo_model_agrees(tmp_path: Path, demo: Path, dtype: str) -> None:
    candle_llama.quantize(demo, tmp_path / "out.gguf", dtype, allow_requantize=True)
    tokenizer = candle_llama.load_tokenizer(demo)
    ids = tokenizer.encode("The capital of France is Paris. The capital of Germany is")
    assert_same_ids(tmp_path / "out.gguf", TEXTS)
    with test_quantize.load(tmp_path / "out.gguf") as llm, peer(tmp_path / "out.gguf") as other:
        got, expected = peer_logits(other, ids), llm.logits(ids)
    assert relative_error(got, expected) <= {"f32": 1e-4}.get(dtype, 0.1)
    if dtype != "q4_0":  # requantised from Q4_1, the model is no longer certain of the capital
        for logits in (got, expected):
            assert tokenizer.decode([int(logits[-1].argmax())]) == " Berlin"
