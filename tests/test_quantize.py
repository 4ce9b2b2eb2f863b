"""`quantize`: blocks, files, and that a written model equals its source."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import candle_llama
import llama_cpp_source
import tiny
from candle_llama import CheckpointError, UnsupportedModelError, cli
from candle_llama.bench.numpy_llama import NumpyLlama
from candle_llama.bench.read_checkpoint import read_gguf_metadata
from candle_llama.bench.synthetic import write_synthetic

TYPES = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "f16", "bf16", "f32"]
# The types of a mixture's matrices, in a model of two layers: with rows of 256, and with shorter ones.
MIXTURES = {
    "q2_k": ({"Q2_K", "Q3_K", "Q6_K"}, {"Q4_0", "Q8_0"}),
    "q3_k_m": ({"Q3_K", "Q4_K", "Q5_K", "Q6_K"}, {"Q4_0", "Q5_0", "Q5_1", "Q8_0"}),
    "q4_k_s": ({"Q4_K", "Q5_K", "Q6_K"}, {"Q5_0", "Q5_1", "Q8_0"}),
    "q4_k_m": ({"Q4_K", "Q6_K"}, {"Q5_0", "Q8_0"}),
    "q5_k_s": ({"Q5_K", "Q6_K"}, {"Q5_1", "Q8_0"}),
    "q5_k_m": ({"Q5_K", "Q6_K"}, {"Q5_1", "Q8_0"}),
    "q6_k": ({"Q6_K"}, {"Q8_0"}),
}
INEXPRESSIBLE = {
    "gelu": "hidden_act",
    "gelu-tanh": "hidden_act",
    "quick-gelu": "hidden_act",
    "dynamic-rope": "rope_type",
    "v5-dynamic-rope": "rope_type",
    "v5-yarn-rope-not-truncated": "truncate",
}
TEXTS = [
    "",
    "a",
    " a",
    "Hello world, the thé 😀!\n\n  and 12345.67",
    "<|begin|>the<|end|> the",
    "\r\n\t\x00 x",
]


def load(path: Path) -> candle_llama.Llama:
    return candle_llama.load(path, device="cpu", engine="cpu", compute="exact")


def random_ids(count: int = 90, vocab_size: int = tiny.VOCAB_SIZE) -> list[int]:
    return np.random.default_rng(1).integers(0, vocab_size, count).tolist()


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Blocks


def test_golden_blocks_are_what_the_script_writes() -> None:
    golden = Path(__file__).parent.parent / "crates/kernels/tests/golden/quantized.txt"
    script = runpy.run_path(str(golden.with_suffix(".py")))
    assert script["lines"]() == golden.read_text(encoding="ascii"), f"run {golden.with_suffix('.py')}"


@pytest.mark.parametrize("dtype", TYPES)
def test_the_file_holds_the_blocks_that_the_gguf_package_makes(tmp_path: Path, dtype: str) -> None:
    config = tiny.gguf_config(tie_word_embeddings=False, attention_bias=True, num_key_value_heads=2)
    tensors = tiny.tiny_tensors(config)
    path = tiny.write_checkpoint(tmp_path / "model", config)
    assert cli.main(["quantize", str(path), str(tmp_path / "out.gguf"), "--type", dtype.upper()]) == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert set(stored) == {tiny.gguf_name(name) for name in tensors}
    for name, values in tensors.items():
        if "q_proj" in name:
            values = tiny.permute_rows(values, 4)
        elif "k_proj" in name:
            values = tiny.permute_rows(values, 2)
        kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else dtype.upper()]
        found = stored[tiny.gguf_name(name)]
        assert (found.tensor_type, found.shape.tolist()) == (kind, list(values.shape[::-1])), name
        assert found.data.tobytes() == gguf.quantize(values, kind).tobytes(), name


# A written model equals its source


@pytest.mark.parametrize("name", sorted(set(tiny.VARIANTS) - set(INEXPRESSIBLE)))
def test_float32_files_give_the_folder_s_logits_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = tiny.VARIANTS[name]
    has_tokenizer = config["vocab_size"] == tiny.VOCAB_SIZE
    path = tiny.write_checkpoint(tmp_path / "model", config, tokenizer=has_tokenizer)
    report = candle_llama.quantize(path, tmp_path / "out.gguf", "f32", tokenizer=has_tokenizer)
    assert report.tensors.keys() == {"F32"}
    assert report.bytes == (tmp_path / "out.gguf").stat().st_size
    ids = random_ids(vocab_size=config["vocab_size"])
    with load(path) as folder, load(tmp_path / "out.gguf") as file:
        expected, got = folder.logits(ids), file.logits(ids)
        assert folder.load_report.lm_head == file.load_report.lm_head
        if has_tokenizer:
            for text in TEXTS:
                assert folder.tokenizer.encode(text) == file.tokenizer.encode(text)
    if "llama3" in name:
        # A float32 divisor may change the last bit of a blended frequency.
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    else:
        np.testing.assert_array_equal(got, expected)
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(ids)
    np.testing.assert_allclose(got, reference, atol=2e-4 * np.abs(reference).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_unchanged(tmp_path: Path, dtype: str) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.VARIANTS["mha-untied"], dtype=dtype, shards=2)
    short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    candle_llama.quantize(path, tmp_path / "out.gguf", short)
    candle_llama.quantize(path, tmp_path / "wide.gguf", "f32")
    ids = random_ids()
    with load(path) as folder, load(tmp_path / "out.gguf") as file, load(tmp_path / "wide.gguf") as wide:
        np.testing.assert_array_equal(file.logits(ids), folder.logits(ids))
        np.testing.assert_array_equal(wide.logits(ids), folder.logits(ids))


@pytest.mark.parametrize("dtype", TYPES)
def test_quantised_files_equal_numpy(tmp_path: Path, dtype: str) -> None:
    config = tiny.gguf_config(rope_scaling=tiny.LLAMA3_ROPE, rope_theta=50000.0)
    path = tiny.write_checkpoint(tmp_path / "model", config, dtype="bfloat16")
    report = candle_llama.quantize(path, tmp_path / "out.gguf", dtype)
    assert report.tensors.keys() == {"F32", dtype.upper()}
    assert report.notes == []
    ids = random_ids(40)
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(ids)
    with load(tmp_path / "out.gguf") as llm:
        assert llm.load_report.lm_head == "tied"
        error = np.abs(llm.logits(ids) - reference).max()
    assert error <= 2e-4 * np.abs(reference).max()


@pytest.mark.parametrize("hidden_size", [256, 96])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_equal_numpy_and_what_load_makes(tmp_path: Path, mixture: str, hidden_size: int) -> None:
    config = tiny.gguf_config(
        hidden_size=hidden_size, intermediate_size=2 * hidden_size, tie_word_embeddings=hidden_size == 256
    )
    folder = tiny.write_checkpoint(tmp_path / "model", config, dtype="bfloat16")
    report = candle_llama.quantize(folder, tmp_path / "out.gguf", mixture)
    wide, narrow = MIXTURES[mixture]
    types = {"F32"} | (wide if hidden_size == 256 else narrow)
    assert report.tensors.keys() == types
    wanted = {note.split(" of ")[1].split(";")[0] for note in report.notes}
    assert wanted == (set() if hidden_size == 256 else wide)
    number = read_gguf_metadata(tmp_path / "out.gguf")["general.file_type"]
    assert number == gguf.LlamaFileType[f"MOSTLY_{mixture.upper()}"]
    ids = random_ids(40)
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(ids)
    with load(tmp_path / "out.gguf") as written:
        expected = written.logits(ids)
        assert written.load_report.storage.keys() == types
    assert np.abs(expected - reference).max() <= 2e-4 * np.abs(reference).max()
    options: dict[str, Any] = {"device": "cpu", "engine": "cpu", "compute": "exact", "quantize": mixture}
    with candle_llama.load(folder, **options) as llm:
        assert llm.load_report.storage.keys() == types
        np.testing.assert_array_equal(llm.logits(ids), expected)
    assert candle_llama.estimate_memory(folder, **options).weights == llm.load_report.bytes


def test_a_mixture_stores_rows_that_are_no_whole_blocks_as_f16(tmp_path: Path) -> None:
    config = tiny.gguf_config(hidden_size=40, intermediate_size=512)
    path = tiny.write_checkpoint(tmp_path / "model", config)
    report = candle_llama.quantize(path, tmp_path / "out.gguf", "q4_k_m")
    assert {name: entry.count for name, entry in report.tensors.items()} == {
        "F16": 13,
        "F32": 5,
        "Q4_K": 1,
        "Q6_K": 1,
    }
    assert [note.split(",")[0] for note in report.notes] == [
        "11 tensors are stored as F16",
        "2 tensors are stored as F16",
    ]
    with candle_llama.load(path, device="cpu", quantize="q4_k_m", compute="exact") as llm:
        assert llm.load_report.storage.keys() == {"F32", "Q4_K", "Q6_K"}


def test_rows_that_are_no_whole_blocks_become_f16(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.gguf_config(hidden_size=40))
    report = candle_llama.quantize(path, tmp_path / "out.gguf", "q8_0")
    assert {name: entry.count for name, entry in report.tensors.items()} == {"F16": 13, "F32": 5, "Q8_0": 2}
    assert len(report.notes) == 1
    assert "13 tensors are stored as F16" in report.notes[0]
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(random_ids(20))
    with load(tmp_path / "out.gguf") as llm:
        assert np.abs(llm.logits(random_ids(20)) - reference).max() <= 2e-4 * np.abs(reference).max()


def test_the_head_is_written_if_it_is_used(tmp_path: Path) -> None:
    def names(folder: Path) -> set[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            candle_llama.quantize(folder, tmp_path / "out.gguf", "f16", force=True)
        return {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}

    tied, untied = tiny.tiny_config(), tiny.tiny_config(tie_word_embeddings=False)
    same = tiny.tiny_tensors(tied)
    same["lm_head.weight"] = same["model.embed_tokens.weight"]
    cases = [
        ("tied", tied, None, None, False),
        ("tied-equal", tied, None, same, False),
        ("tied-different", tied, True, None, True),
        ("untied-absent", untied, False, None, False),
        ("untied", untied, None, None, True),
    ]
    for name, config, lm_head, tensors, expected in cases:
        path = tiny.write_checkpoint(tmp_path / name, config, lm_head=lm_head, tensors=tensors)
        assert ("output.weight" in names(path)) is expected, name


def test_end_tokens_template_and_bos_are_kept(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "model")
    candle_llama.quantize(path, tmp_path / "out.gguf", "f32")
    messages = [{"role": "user", "content": "hi"}]
    with load(path) as folder, load(tmp_path / "out.gguf") as file:
        assert folder.tokenizer.apply_chat_template(messages) == file.tokenizer.apply_chat_template(messages)
        assert folder.tokenizer.bos_token_id == file.tokenizer.bos_token_id == tiny.BOS
        assert folder.tokenizer.eos_token_id == file.tokenizer.eos_token_id == tiny.EOS
        assert sorted(file.config.eos_token_id) == sorted([tiny.EOS, tiny.END_OF_TURN])
        for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings", "head_dim", "vocab_size"):
            assert getattr(folder.config, key) == getattr(file.config, key), key


def test_a_gguf_file_is_copied_except_for_its_matrices(tmp_path: Path) -> None:
    config = tiny.gguf_config(num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True)
    path = tiny.write_gguf(
        tmp_path / "in.gguf", config, rope_factors=np.linspace(1, 8, 8), add_bos=True, split_max_tensors=7
    )
    first = next(tmp_path.glob("in-00001-of-*.gguf")) if not path.exists() else path
    candle_llama.quantize(first, tmp_path / "out.gguf", "q8_0")
    before, after = gguf.GGUFReader(first), gguf.GGUFReader(tmp_path / "out.gguf")
    own = ("GGUF.", "split.", "general.file_type", "general.quantization_version")
    for key, field in before.fields.items():
        if not key.startswith(own):
            assert after.fields[key].contents() == field.contents(), key
    ids = random_ids(30)
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(ids)
    with load(tmp_path / "out.gguf") as llm, load(first) as original:
        assert np.abs(llm.logits(ids) - reference).max() <= 2e-4 * np.abs(reference).max()
        assert np.abs(llm.logits(ids) - original.logits(ids)).max() <= 0.05 * np.abs(reference).max()


def test_quantised_tensors_are_copied_dequantised_or_refused(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "in.gguf", matrix_type="Q8_0")
    for dtype in ("q4_0", "f16"):
        with pytest.raises(UnsupportedModelError, match="allow_requantize") as raised:
            candle_llama.quantize(path, tmp_path / "out.gguf", dtype)
        assert raised.value.key == "requantizing"
        assert names_in(tmp_path) == ["in.gguf"]
    ids = random_ids(30)
    with load(path) as original:
        expected = original.logits(ids)
        for dtype in ("q8_0", "f32"):
            candle_llama.quantize(path, tmp_path / f"{dtype}.gguf", dtype)
            with load(tmp_path / f"{dtype}.gguf") as llm:
                np.testing.assert_allclose(llm.logits(ids), expected, atol=1e-4, rtol=0)
    report = candle_llama.quantize(path, tmp_path / "q4_0.gguf", "q4_0", allow_requantize=True)
    assert report.tensors.keys() == {"F32", "Q4_0"}


# Tokenizers


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[candle_llama.Tokenizer, candle_llama.Tokenizer]:
    """A folder's tokenizer, and that of the GGUF file made from the folder."""
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("both") / "model")
    candle_llama.quantize(folder, folder.parent / "out.gguf")
    return candle_llama.load_tokenizer(folder), candle_llama.load_tokenizer(folder.parent / "out.gguf")


@hypothesis.given(text=st.text() | st.lists(st.sampled_from([*tiny.VOCABULARY, " ", "\n"])).map("".join))
def test_any_text_has_the_same_ids(
    both: tuple[candle_llama.Tokenizer, candle_llama.Tokenizer], text: str
) -> None:
    folder, file = both
    ids = folder.encode(text)
    assert file.encode(text) == ids
    assert file.encode(text, split_special_tokens=True) == folder.encode(text, split_special_tokens=True)
    assert file.decode(ids) == folder.decode(ids)


def tokenizer_with(change: dict[str, Any]) -> dict[str, Any]:
    tokenizer = tiny.tokenizer_json()
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(tokenizer.get(key), dict) and "type" not in value:
            tokenizer[key] = {**tokenizer[key], **value}
        else:
            tokenizer[key] = value
    return tokenizer


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"normalizer": {"type": "NFC"}}, "tokenizer normalizer"),
        ({"pre_tokenizer": {"add_prefix_space": True}}, "tokenizer pre_tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "tokenizer pre_tokenizer"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": "[a-z]"},
                            "behavior": "Isolated",
                            "invert": False,
                        },
                        BYTES,
                    ],
                }
            },
            "tokenizer pre_tokenizer",
        ),
        ({"model": {"ignore_merges": True}}, "tokenizer pre_tokenizer"),
        ({"model": {"dropout": 0.5}}, "tokenizer model.dropout"),
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}},
            "tokenizer model",
        ),
    ],
)
def test_a_tokenizer_that_gguf_cannot_name_is_refused_and_can_be_left_out(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    path = tiny.write_checkpoint(tmp_path / "model")
    tiny.write_json(path / "tokenizer.json", tokenizer_with(change))
    with pytest.raises(UnsupportedModelError, match="--no-tokenizer") as raised:
        candle_llama.quantize(path, tmp_path / "out.gguf")
    assert raised.value.key == key
    assert names_in(tmp_path) == ["model"]
    candle_llama.quantize(path, tmp_path / "out.gguf", tokenizer=False)
    with load(tmp_path / "out.gguf") as llm:
        assert any("no tokenizer" in note for note in llm.load_report.notes)
        assert sorted(llm.config.eos_token_id) == sorted([tiny.EOS, tiny.END_OF_TURN])
        llm.generate([1, 2, 3], max_new_tokens=2)


def test_a_folder_without_a_tokenizer_says_how_to_leave_it_out(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tokenizer=False)
    with pytest.raises(FileNotFoundError, match="--no-tokenizer"):
        candle_llama.quantize(path, tmp_path / "out.gguf")


def test_rows_without_a_token_get_a_placeholder(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.tiny_config(vocab_size=tiny.VOCAB_SIZE + 3))
    candle_llama.quantize(path, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[-3:] == [f"[PAD{tiny.VOCAB_SIZE + i}]" for i in range(3)]
    assert fields["tokenizer.ggml.token_type"].contents()[-3:] == [gguf.TokenType.UNUSED] * 3


def test_added_tokens_beyond_the_model_are_left_out_with_a_warning(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.tiny_config(vocab_size=tiny.VOCAB_SIZE - 1))
    with pytest.warns(UserWarning, match=r"1 tokens beyond .* left out: <\|pad\|>"):
        candle_llama.quantize(path, tmp_path / "out.gguf")
    path = tiny.write_checkpoint(
        tmp_path / "less", tiny.tiny_config(vocab_size=200, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(UnsupportedModelError, match="for a model of 200"):
        candle_llama.quantize(path, tmp_path / "less.gguf")


# SentencePiece


def sentence_pieces() -> list[tuple[str, float, int]]:
    """Text, score and type of a small vocabulary like Llama 2's."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    made = [
        "▁t",
        "he",
        "the",
        "▁the",
        "in",
        "▁a",
        "an",
        "and",
        "▁w",
        "or",
        "▁wor",
        "ld",
        "▁world",
        "ll",
        "▁▁",
        "ello",
    ]
    pieces += [(text, -float(i), 1) for i, text in enumerate(made)]
    letters = sorted({letter for text in made for letter in text} | set("bcfgijkmpquvxyz,.!'"))
    return pieces + [(letter, -1000.0 - i, 1) for i, letter in enumerate(letters)]


def llama_2_tokenizer(
    metaspace: str | None, pieces: list[tuple[str, float, int]] | None = None
) -> dict[str, Any]:
    """The same vocabulary as transformers converts it, with merges in the order of the pieces' scores."""
    pieces = pieces or sentence_pieces()
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = [
        (text[:at], text[at:])
        for text, _, kind in sorted(pieces, key=lambda piece: -piece[1])
        for at in range(1, len(text))
        if kind == 1 and text[:at] in ids and text[at:] in ids
    ]
    prepend = [{"type": "Prepend", "prepend": "▁"}]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i][0], **flags} for i in range(3)],
        "normalizer": None if metaspace else {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": metaspace,
            "split": False,
        }
        if metaspace
        else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": [" ".join(merge) for merge in merges],
        },
    }


SPOKEN = [
    "the world",
    " the  world and an  inn",
    "hello, thé 😀\nworld",
    "andtheworld in a the",
    "a",
    "",
    "   ",
    "wor wor ld",
]


def llama_2(folder: Path, tokenizer: dict[str, Any] | None, vocab_size: int | None = None) -> Path:
    size = vocab_size or len(sentence_pieces())
    config = tiny.tiny_config(vocab_size=size, bos_token_id=1, eos_token_id=2)
    path = tiny.write_checkpoint(folder, config, tokenizer=False)
    if tokenizer:
        tiny.write_json(path / "tokenizer.json", tokenizer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tiny.write_json(path / "tokenizer_config.json", special)
    return path


@pytest.mark.parametrize("metaspace", [None, "always", "never"])
def test_llama_2_s_tokenizer_json_becomes_scores(tmp_path: Path, metaspace: str | None) -> None:
    tokenizer = llama_2_tokenizer(metaspace)
    if metaspace == "never":
        tokenizer["decoder"]["decoders"].pop()
    path = llama_2(tmp_path / "model", tokenizer)
    texts = [*SPOKEN, "<s>the</s> world"]
    if metaspace == "always":
        # This tokenizer adds no space to a text that begins with one; readers of GGUF do.
        texts = [text for text in SPOKEN if not text.startswith(" ")]
        with pytest.warns(UserWarning, match="before a text that begins with one"):
            candle_llama.quantize(path, tmp_path / "out.gguf")
    else:
        candle_llama.quantize(path, tmp_path / "out.gguf")
    folder, file = candle_llama.load_tokenizer(path), candle_llama.load_tokenizer(tmp_path / "out.gguf")
    assert file.kind == "gguf llama"
    for text in texts:
        assert file.encode(text) == folder.encode(text), text
        assert file.decode(folder.encode(text)) == folder.decode(folder.encode(text)), text


def test_a_different_treatment_of_spaces_by_gguf_readers_is_a_warning(tmp_path: Path) -> None:
    path = llama_2(tmp_path / "model", llama_2_tokenizer("first"))
    with pytest.warns(UserWarning, match="put a space where this tokenizer does not"):
        candle_llama.quantize(path, tmp_path / "out.gguf")
    folder, file = candle_llama.load_tokenizer(path), candle_llama.load_tokenizer(tmp_path / "out.gguf")
    for text in SPOKEN:
        if not text.startswith(" "):
            assert file.encode(text) == folder.encode(text), text


def test_merges_that_scores_cannot_express_are_refused(tmp_path: Path) -> None:
    tokenizer = llama_2_tokenizer(None)
    merges = tokenizer["model"]["merges"]
    assert [merge for merge in merges if merge.replace(" ", "") == "▁the"] == ["▁ the", "▁t he"]
    merges.remove("▁t he")
    merges.append("▁t he")
    with pytest.raises(UnsupportedModelError, match="do not stand together"):
        candle_llama.quantize(llama_2(tmp_path / "model", tokenizer), tmp_path / "out.gguf")


def test_tokenizer_model_is_copied_piece_by_piece(tmp_path: Path) -> None:
    path = llama_2(tmp_path / "model", None)
    protocol_buffer = runpy.run_path(str(Path(__file__).with_name("test_tokenizers.py")))["protocol_buffer"]
    (path / "tokenizer.model").write_bytes(protocol_buffer(sentence_pieces()))
    candle_llama.quantize(path, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    columns = [fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")]
    assert list(zip(*columns, strict=True)) == sentence_pieces()
    folder, file = candle_llama.load_tokenizer(path), candle_llama.load_tokenizer(tmp_path / "out.gguf")
    for text in [*SPOKEN, "<s>the</s> world"]:
        assert file.encode(text) == folder.encode(text), text


# Refusals


@pytest.mark.parametrize(("name", "key"), INEXPRESSIBLE.items())
def test_a_config_that_gguf_has_no_key_for_is_refused_by_name(tmp_path: Path, name: str, key: str) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.VARIANTS[name])
    with pytest.raises(UnsupportedModelError, match="no key") as raised:
        candle_llama.quantize(path, tmp_path / "out.gguf", "f32")
    assert raised.value.key == key
    assert names_in(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("model.layers.1.mlp.down_proj.weight", np.nan, "q4_0"),
        ("model.layers.1.mlp.down_proj.weight", np.inf, "f32"),
        ("model.layers.0.self_attn.q_proj.weight", -np.inf, "q8_0"),
        ("model.layers.0.self_attn.k_proj.weight", 1e6, "f16"),
        ("model.layers.0.self_attn.q_proj.weight", 9e6, "q8_0"),
        ("model.norm.weight", np.nan, "q4_0"),
        ("model.embed_tokens.weight", np.nan, "q5_1"),
        ("model.embed_tokens.weight", np.nan, "q4_k_m"),
        ("model.layers.1.mlp.down_proj.weight", np.inf, "q3_k_m"),
        ("model.layers.0.mlp.up_proj.weight", 1e8, "q4_k_s"),
        ("model.layers.0.mlp.up_proj.weight", -1e38, "q2_k"),
    ],
)
def test_a_weight_that_cannot_be_stored_is_refused_by_name_and_place(
    tmp_path: Path, name: str, value: float, dtype: str
) -> None:
    config = tiny.gguf_config(hidden_size=256, intermediate_size=512)
    tensors = tiny.tiny_tensors(config)
    place = (3, 35) if tensors[name].ndim == 2 else (3,)
    tensors[name][place] = value
    path = tiny.write_checkpoint(tmp_path / "model", config, tensors=tensors)
    (tmp_path / "out.gguf").write_text("old")
    with pytest.raises(CheckpointError) as raised:
        candle_llama.quantize(path, tmp_path / "out.gguf", dtype, force=True)
    assert raised.value.tensor == name
    assert raised.value.got == pytest.approx(value, nan_ok=True)
    assert str(list(place)) in str(raised.value)
    assert (tmp_path / "out.gguf").read_text() == "old"
    assert names_in(tmp_path) == ["model", "out.gguf"]


def test_an_existing_file_is_replaced_only_with_force(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "out.gguf").write_text("old")
    with pytest.raises(FileExistsError, match="force") as raised:
        candle_llama.quantize(tiny, tmp_path / "out.gguf")
    assert raised.value.filename == str(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "old"
    candle_llama.quantize(tiny, tmp_path / "out.gguf", force=True)
    candle_llama.quantize(tmp_path / "out.gguf", tmp_path / "out.gguf", "f32", force=True)
    assert names_in(tmp_path) == ["out.gguf"]
    load(tmp_path / "out.gguf").close()


def test_a_destination_that_cannot_be_written_is_refused_first(tmp_path: Path, tiny: Path) -> None:
    for destination, error in [
        (tmp_path, ValueError),
        (tmp_path / "none" / "out.gguf", FileNotFoundError),
        (Path(os.devnull), ValueError),
        ("..", ValueError),
    ]:
        with pytest.raises(error):
            candle_llama.quantize(tiny, destination, force=True)
    with pytest.raises(ValueError, match=r"destination: character \d+ is '\\ud800'"):
        candle_llama.quantize(tiny, tmp_path / "\ud800.gguf")
    with pytest.raises(ValueError, match=r"q8_0, q4_0"):
        candle_llama.quantize(tiny, tmp_path / "out.gguf", "q3_0")
    for threads in (0, -1, 10**6):
        with pytest.raises(ValueError, match="threads"):
            candle_llama.quantize(tiny, tmp_path / "out.gguf", threads=threads)
    with pytest.raises(FileNotFoundError):
        candle_llama.quantize(tmp_path / "model.gguf", tmp_path / "out.gguf")
    assert names_in(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_os_error(tmp_path: Path, tiny: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        candle_llama.quantize(tiny, tmp_path / "out.gguf")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs POSIX limits")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, tiny: Path) -> None:
    code = (
        "import resource, signal, sys, candle_llama\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "candle_llama.quantize(sys.argv[1], sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tiny), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("dtype", ["q5_1", "q2_k"])
def test_threads_do_not_change_a_bit(tmp_path: Path, dtype: str) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.gguf_config(hidden_size=2048, vocab_size=1000))
    files = []
    for threads in (1, 3, 100):
        candle_llama.quantize(path, tmp_path / "out.gguf", dtype, force=True, threads=threads)
        files.append((tmp_path / "out.gguf").read_bytes())
    assert files[0] == files[1] == files[2]


# The command


def test_json_is_one_object(tmp_path: Path, tiny: Path, command: Any) -> None:
    done = command("quantize", tiny, tmp_path / "out.gguf", "--type", "q8_0", "--json")
    assert done.returncode == 0
    assert done.stderr.startswith("candle-llama: 15 tensors are stored as F16")
    assert len(done.stderr.splitlines()) == 1
    printed = json.loads(done.stdout)
    assert printed["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert printed["seconds"] > 0
    assert printed["tensors"]["F32"]["count"] == 5
    assert printed["warnings"] == []
    done = command("quantize", tiny, tmp_path / "out.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert command("quantize", tiny, tmp_path / "out.gguf", "--force").returncode == 0
    for wrong in ((), (tiny,), (tiny, tmp_path / "out.gguf", "--type", "q9")):
        assert command("quantize", *wrong).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_shown_in_a_terminal_and_then_removed(tmp_path: Path, tiny: Path) -> None:
    import pexpect

    arguments = ["-m", "candle_llama", "quantize", str(tiny), str(tmp_path / "out.gguf")]
    child = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=20)
    child.expect(r"\rquantize \[#{30}\] 100%\r +\r")
    child.expect("F16 +15 tensors")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


INTERRUPTED = """
import sys, candle_llama
print("begun", flush=True)
try:
    candle_llama.quantize(sys.argv[1], sys.argv[2], sys.argv[3], force=True)
    print("ended", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """270 MB of weights."""
    return write_synthetic("smollm2-135m", cache_dir=tmp_path_factory.mktemp("synthetic"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("dtype", ["q5_1", "q2_k"])
def test_ctrl_c_returns_within_200_ms_and_leaves_the_old_file(
    tmp_path: Path, large: Path, dtype: str
) -> None:
    (tmp_path / "out.gguf").write_text("old")
    delays: list[float] = []
    command = [sys.executable, "-c", INTERRUPTED, str(large), str(tmp_path / "out.gguf"), dtype]
    while not delays or (min(delays) > 0.2 and len(delays) < 3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            # Wait until it is in the middle of the tensors.
            while not any(file.stat().st_size > 10**7 for file in tmp_path.glob(".candle-llama-*.tmp")):
                assert child.poll() is None
                time.sleep(0.001)
            sent = time.monotonic()
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "interrupted\n"
            delays.append(time.monotonic() - sent)
        assert child.returncode == 0
        assert names_in(tmp_path) == ["out.gguf"]
        assert (tmp_path / "out.gguf").read_text() == "old"
    assert min(delays) <= 0.2


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
def test_memory_is_bounded_whatever_the_size(tmp_path: Path, large: Path) -> None:
    # The limit covers allocated memory; the system may drop pages of the mapped file at any time. The
    # tokenizer is left out, because its memory does not depend on the size of the weights.
    code = (
        "import resource, sys, candle_llama\n"
        "def data():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmData')) * 1024\n"
        "limit = data() + 100 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "report = candle_llama.quantize(sys.argv[1], sys.argv[2], 'f32', tokenizer=False, threads=2)\n"
        "print(report.bytes)\n"
    )
    command = [sys.executable, "-c", code, str(large), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500 * 10**6


# Vocabularies of real models


def folder_of(path: Path, vocabulary: Path, pre_tokenizer: dict[str, Any], ignore_merges: bool) -> Path:
    """A tiny model with the tokenizer.json of a GGUF file's byte-level vocabulary."""
    fields = read_gguf_metadata(vocabulary)
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = tiny.tokenizer_json(add_bos=False)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": ids[token], "content": token, **flags} for token in added]
    tokenizer["pre_tokenizer"] = pre_tokenizer
    tokenizer["model"] |= {
        "vocab": ids,
        "merges": merges,
        "ignore_merges": ignore_merges,
    }
    config = tiny.tiny_config(vocab_size=len(tokens), bos_token_id=0, eos_token_id=0)
    tiny.write_checkpoint(path, config, tokenizer=False)
    tiny.write_json(path / "tokenizer.json", tokenizer)
    return path


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("vocabulary", "steps", "ignore_merges", "name"),
    [
        ("llama-bpe", [SPLIT, BYTES], True, "llama-bpe"),
        ("llama-bpe", [SPLIT, BYTES], False, "smaug-bpe"),
        ("gpt-2", [{**BYTES, "use_regex": True}], False, "gpt-2"),
        ("starcoder", [DIGITS, {**BYTES, "use_regex": True}], False, "smollm"),
    ],
)
def test_pre_tokenizers_are_recognised(
    tmp_path: Path, vocabulary: str, steps: list[dict[str, Any]], ignore_merges: bool, name: str
) -> None:
    source = llama_cpp_source.models_folder() / f"ggml-vocab-{vocabulary}.gguf"
    folder = folder_of(
        tmp_path / "model", source, {"type": "Sequence", "pretokenizers": steps}, ignore_merges
    )
    candle_llama.quantize(folder, tmp_path / "out.gguf")
    assert read_gguf_metadata(tmp_path / "out.gguf")["tokenizer.ggml.pre"] == name
    file, own = (candle_llama.load_tokenizer(path) for path in (tmp_path / "out.gguf", folder))
    texts = source.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    for text in texts:
        assert file.encode(text) == own.encode(text), text


def test_llama_3_s_own_tokenizer_model_is_written(tmp_path: Path) -> None:
    config = tiny.tiny_config(vocab_size=128256, bos_token_id=128000, eos_token_id=128001)
    path = tiny.write_checkpoint(tmp_path / "model", config, tokenizer=False)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128009]}))
    shutil.copy(llama_cpp_source.llama_3_folder() / "tokenizer.model", path)
    candle_llama.quantize(path, tmp_path / "out.gguf")
    source = llama_cpp_source.models_folder() / "ggml-vocab-llama-bpe.gguf"
    file, expected = candle_llama.load_tokenizer(tmp_path / "out.gguf"), candle_llama.load_tokenizer(source)
    assert file.kind == "gguf bpe llama-bpe"
    for text in source.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n"):
        assert file.encode(text) == expected.encode(text), text


def test_llama_2_s_scores_can_be_derived_from_its_merges(tmp_path: Path) -> None:
    source = llama_cpp_source.models_folder() / "ggml-vocab-llama-spm.gguf"
    fields = read_gguf_metadata(source)
    columns = [fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    path = llama_2(tmp_path / "model", llama_2_tokenizer(None, list(zip(*columns, strict=True))), 32000)
    candle_llama.quantize(path, tmp_path / "out.gguf")
    file, expected = candle_llama.load_tokenizer(tmp_path / "out.gguf"), candle_llama.load_tokenizer(source)
    for text in source.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n"):
        assert file.encode(text) == expected.encode(text), text


NO_THREAD = """
import os, resource, sys
import candle_llama
os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setuid(65534)  # The limit does not apply to root.
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    candle_llama.quantize("model", "out.gguf", dtype="q8_0")
except candle_llama.DeviceError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of threads")
def test_without_a_spare_thread_the_device_is_to_blame(tmp_path):
    tiny.write_checkpoint(tmp_path / "model")
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o777)
    done = subprocess.run([sys.executable, "-c", NO_THREAD, str(tmp_path)], capture_output=True, text=True)
    assert "no further thread" in done.stdout, done.stderr
