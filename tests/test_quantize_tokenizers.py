"""`quantize`: tokenizers as GGUF metadata, and that a written tokenizer equals its source."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import pytest
from hypothesis import strategies as st

import candle_llama
import llama_cpp_source
import tiny
from candle_llama import UnsupportedModelError
from candle_llama.bench.read_checkpoint import read_gguf_metadata
from quantizing import load, names_in


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
