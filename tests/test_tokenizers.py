"""Token ids of real vocabularies, of unusual folders, and of broken vocabularies."""

import itertools
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

import candle_llama
import llama_cpp_source
import tiny

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

# The vocabularies of llama.cpp that occur in files of the architecture "llama", and `Tokenizer.kind` of each.
VOCABULARIES = {
    "llama-spm": "gguf llama",
    "llama-bpe": "gguf bpe llama-bpe",
    "gpt-2": "gguf bpe gpt-2",
    "refact": "gguf bpe refact",
    "starcoder": "gguf bpe starcoder",
    "deepseek-llm": "gguf bpe deepseek-llm",
    "deepseek-coder": "gguf bpe deepseek-coder",
    "phi-3": "gguf llama",
}


def vectors(path: Path) -> list[tuple[str, list[int]]]:
    """The texts of llama.cpp's own test, and the ids that they must give."""
    texts = path.with_suffix(".gguf.inp").read_bytes().decode()
    ids = path.with_suffix(".gguf.out").read_text()
    # Each text is followed by a separator; the ids of each text are one line.
    separator = "\n__ggml_vocab_test__\n"
    return list(
        zip(
            texts.split(separator)[:-1],
            [list(map(int, line.split())) for line in ids.split("\n")[:-1]],
            strict=True,
        )
    )


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_llama_cpp(name: str) -> None:
    path = llama_cpp_source.models_folder() / f"ggml-vocab-{name}.gguf"
    tokenizer = candle_llama.load_tokenizer(path)
    assert tokenizer.kind == VOCABULARIES[name]
    cases = vectors(path)
    assert len(cases) > 30
    for text, ids in cases:
        assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
        assert tokenizer.decode(ids) == text


def test_llama_3_s_own_tokenizer_model_gives_the_ids_of_its_gguf(tmp_path: Path) -> None:
    shutil.copy(llama_cpp_source.llama_3_folder() / "tokenizer.model", tmp_path)
    tokenizer = candle_llama.load_tokenizer(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("tokenizer.model", 128256)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (128000, 128001)
    path = llama_cpp_source.models_folder() / "ggml-vocab-llama-bpe.gguf"
    for text, ids in vectors(path):
        assert tokenizer.encode(text, split_special_tokens=True) == [128000, *ids], text
    spoken = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    assert tokenizer.encode(spoken) == candle_llama.load_tokenizer(path).encode(spoken)
    # Special tokens by the names of Llama 3.1, in token order.
    assert tokenizer.encode("<|eom_id|><|python_tag|>", add_special_tokens=False) == [128008, 128010]
    # The 128,000 tokens are the same bytes under the same ids.
    vocabulary = candle_llama.load_tokenizer(path)
    for token_id in range(0, 128000, 7):
        assert tokenizer.decode([token_id]) == vocabulary.decode([token_id])


def protocol_buffer(tokens: list[tuple[str, float, int]]) -> bytes:
    """A tokenizer.model with these pieces, scores and types, and the settings of Llama 2."""

    def number(value: int) -> bytes:
        low, rest = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + number(rest) if rest else bytes([low])

    def message(field: int, content: bytes) -> bytes:
        return number(field << 3 | 2) + number(len(content)) + content

    pieces = b"".join(
        message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + number(kind))
        for text, score, kind in tokens
    )
    byte_pair_encoding = b"\x18\x02"
    keep_spaces = b"\x20\x00"
    return pieces + message(2, byte_pair_encoding) + message(3, keep_spaces)


def test_llama_2_s_tokenizer_model_gives_the_ids_of_its_gguf(tmp_path: Path) -> None:
    path = llama_cpp_source.models_folder() / "ggml-vocab-llama-spm.gguf"
    reader = gguf.GGUFReader(path)
    columns = [
        reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "scores", "token_type")
    ]
    (tmp_path / "tokenizer.model").write_bytes(protocol_buffer(list(zip(*columns, strict=True))))
    tokenizer = candle_llama.load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, 32000)
    for text, ids in vectors(path):
        assert tokenizer.encode(text, split_special_tokens=True) == [1, *ids], text
        assert tokenizer.decode(ids) == text
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    assert candle_llama.load_tokenizer(tmp_path).encode("Hello world") == [15043, 3186, 2]


@pytest.mark.parametrize(
    "text",
    ["the quick brown fox " * 50_000, "ab" * 500_000, "a" * 1_000_000, " " * 1_000_000, "<" * 1_000_000],
    ids=lambda text: text[:10],
)
@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe"])
def test_a_million_characters_take_seconds(name: str, text: str) -> None:
    tokenizer = candle_llama.load_tokenizer(llama_cpp_source.models_folder() / f"ggml-vocab-{name}.gguf")
    started = time.monotonic()
    ids = tokenizer.encode(text)
    # It takes about a second; a quadratic algorithm would take an hour.
    assert time.monotonic() - started < 30
    assert tokenizer.decode(ids) == text


def test_unusual_folders_give_the_ids_of_the_library(tmp_path: Path) -> None:
    """Truncation, padding, many added tokens beyond the model's vocabulary, and another in the config."""
    file = tiny.tokenizer_json()
    first = tiny.VOCAB_SIZE
    file["added_tokens"] += [
        {"id": first + i, "content": f"<extra{i}>", "special": i % 2 == 0, **FLAGS} for i in range(5000)
    ]
    file["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": tiny.TOKEN_IDS["<|pad|>"],
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    ours = candle_llama.load_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    assert ours.vocab_size == first + 5000
    for text in ["", "hello the world " * 9, "<extra1>a<extra2> <extra4999><|end|>é"]:
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == expected.ids
            assert ours.decode(expected.ids) == theirs.decode(expected.ids)
    (tmp_path / "tokenizer_config.json").write_text('{"additional_special_tokens": ["<new>", "<extra1>"]}')
    more = candle_llama.load_tokenizer(tmp_path)
    assert more.encode("<new>", add_special_tokens=False) == [first + 5000]


def test_bos_without_a_post_processor_follows_the_config(tmp_path: Path) -> None:
    file = {**tiny.tokenizer_json(), "post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    for flags, around in [
        ({}, ([], [])),
        ({"add_bos_token": True}, ([tiny.BOS], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([tiny.BOS], [tiny.EOS])),
        ({"add_bos_token": False}, ([], [])),
    ]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | flags))
        tokenizer = candle_llama.load_tokenizer(tmp_path)
        plain = tokenizer.encode("hello", add_special_tokens=False)
        assert tokenizer.encode("hello") == [*around[0], *plain, *around[1]], flags


def write_vocabulary(path: Path, changes: dict[str, Any]) -> Path:
    """A small vocabulary in GGUF with some of its values changed; None leaves one out."""
    sentence_piece = changes.get("model", "llama") == "llama"
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    values = {
        "model": "llama",
        "tokens": texts if sentence_piece else tiny.VOCABULARY,
        "token_type": [2, 3, 3, *[6] * 256, 1, 1, 1] if sentence_piece else None,
        "scores": [-float(i) for i in range(len(texts))] if sentence_piece else None,
        "merges": None if sentence_piece else tiny.MERGES,
        **changes,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        add = writer.add_array if isinstance(value, list) else writer.add_string
        if isinstance(value, bool):
            add = writer.add_bool
        elif isinstance(value, int):
            add = writer.add_uint32
        if value is not None:
            add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


BROKEN: dict[str, dict[str, Any]] = {
    "fewer scores": {"scores": [0.5]},
    "scores that are no numbers": {"scores": [float("nan")] * 262},
    "fewer types": {"token_type": [1, 1]},
    "tokens that are numbers": {"tokens": [1, 2, 3]},
    "no tokens": {"tokens": None},
    "a flag that is a number": {"add_bos_token": 1},
    "a pre-tokenizer that is a number": {"model": "gpt2", "pre": 3},
    "no merges": {"model": "gpt2", "merges": None},
    "a BOS to be added that is out of range": {"model": "gpt2", "bos_token_id": 999, "add_bos_token": True},
    "an unknown model": {"model": "t5"},
    "an unknown pre-tokenizer": {"model": "gpt2", "pre": "nobody's"},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN)
def test_a_broken_vocabulary_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert candle_llama.load_tokenizer(write_vocabulary(tmp_path / "sound.gguf", {})).vocab_size == 262
    path = write_vocabulary(tmp_path / "broken.gguf", changes)
    with pytest.raises((candle_llama.CheckpointError, candle_llama.UnsupportedModelError)) as caught:
        candle_llama.load_tokenizer(path)
    assert "tokenizer.ggml." in str(caught.value) or "piece" in str(caught.value)


HARMLESS: dict[str, dict[str, Any]] = {
    "a BOS out of range": {"bos_token_id": 262},
    "an EOS out of range": {"model": "gpt2", "eos_token_id": 999},
    "an end of turn out of range": {"eot_token_id": 262},
    "no token": {"eos_token_id": 2**32 - 1},
    "scores that are integers": {"scores": [-i for i in range(262)]},
    "merges of unknown tokens": {"model": "gpt2", "merges": [*tiny.MERGES, "x nobody", "th"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("changes", HARMLESS.values(), ids=HARMLESS)
def test_a_harmless_fault_of_a_vocabulary_changes_no_ids(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = {"model": changes.get("model", "llama")}
    sound = candle_llama.load_tokenizer(write_vocabulary(tmp_path / "sound.gguf", model))
    faulty = candle_llama.load_tokenizer(write_vocabulary(tmp_path / "faulty.gguf", changes))
    for text in ["a", " a a\n", "hello", "the thing"]:
        assert faulty.encode(text) == sound.encode(text)


def test_load_tokenizer_warns_as_load_does(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "it.gguf", {"bos_token_id": 262})
    with pytest.warns(UserWarning, match="bos_token_id is 262 and is ignored"):
        candle_llama.load_tokenizer(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sentence_piece_vocabulary_without_scores_is_read(tmp_path: Path) -> None:
    tokenizer = candle_llama.load_tokenizer(write_vocabulary(tmp_path / "it.gguf", {"scores": None}))
    # "▁a" is the last of the 262 pieces.
    assert tokenizer.encode("a") == [1, 261]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("dbrx", "smaug-bpe"),
        ("qwen2", "megrez"),
        ("stablelm2", "megrez"),
        ("phi-2", "gpt-2"),
        ("lfm2", "llama3"),
    ],
)
def test_llama_cpp_s_other_names_of_a_pre_tokenizer_are_known(
    tmp_path: Path, name: str, same_as: str
) -> None:
    def ids(pre: str) -> list[int]:
        path = write_vocabulary(tmp_path / f"{pre}.gguf", {"model": "gpt2", "pre": pre, "bos_token_id": 0})
        return candle_llama.load_tokenizer(path).encode("hello 12345  the\n thing's")

    assert ids(name) == ids(same_as)


@pytest.mark.filterwarnings("ignore::UserWarning")
@hypothesis.given(
    st.lists(
        st.tuples(
            st.text(max_size=4) | st.sampled_from(["▁", "<unk>", "<0x0A>", "a"]),
            st.floats(width=32) | st.just(0.0),
            st.integers(-1, 7),
        ),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(["llama", "gpt2"]),
    st.text(max_size=30),
)
def test_any_vocabulary_works_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[tuple[str, float, int]], model: str, text: str
) -> None:
    texts, scores, types = (list(column) for column in zip(*tokens, strict=True))
    merges = [f"{left} {right}" for left, right in itertools.pairwise(texts)]
    path = tmp_path_factory.mktemp("vocabulary") / "random.gguf"
    changes = {
        "tokens": texts,
        "scores": scores,
        "token_type": types,
        "merges": merges,
        "unknown_token_id": 0,
    }
    try:
        tokenizer = candle_llama.load_tokenizer(write_vocabulary(path, {"model": model, **changes}))
    except (candle_llama.CheckpointError, candle_llama.UnsupportedModelError):
        return
    ids = tokenizer.encode(text)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    tokenizer.decode(ids)
