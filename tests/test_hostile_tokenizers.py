"""Malicious tokenizers: each gives an answer or a typed error soon, within bounded memory."""

import base64
import itertools
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny as checkpoints

LETTERS = "abcdefghijklmnopqrstuvwxyz "
"""The characters that the vocabularies here have."""

# Prints what became of the file, and the most memory that the process had.
USE = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
import candle_llama

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.monotonic()
try:
    tokenizer = candle_llama.load_tokenizer(sys.argv[1])
    ids = tokenizer.encode(sys.argv[2])
    said = f"{len(ids)} ids, {len(tokenizer.decode(ids[:1000]))} characters"
except (candle_llama.CandleLlamaError, ValueError) as error:
    said = f"{type(error).__name__}: {error}"
took = time.monotonic() - began
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([said, took, held * 1024]), flush=True)
import os; os._exit(0)  # A thread that was given up may still be at work.
"""


def unigram(**changes: Any) -> dict[str, Any]:
    """A Unigram tokenizer of single characters, without the other components."""
    vocab = [["<unk>", 0.0], *([letter, -1.0] for letter in LETTERS)]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False, **changes}
    return {"version": "1.0", "added_tokens": [], "model": model}


def bpe(**parts: Any) -> dict[str, Any]:
    """The tiny checkpoint's tokenizer with other components."""
    return {**checkpoints.tokenizer_json(), **parts}


def replace(pattern: str, content: str) -> dict[str, Any]:
    """A step that replaces a text."""
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def split(expression: str) -> dict[str, Any]:
    """A pre-tokenizer that splits at a regular expression."""
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def charsmap(data: bytes) -> dict[str, Any]:
    """A normalizer with a precompiled character map."""
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def nested(key: str, depth: int) -> dict[str, Any]:
    """Sequences inside of sequences."""
    step: dict[str, Any] = {"type": "Sequence", key: []}
    for _ in range(depth):
        step = {"type": "Sequence", key: [step]}
    return step


def template(pieces: int) -> dict[str, Any]:
    """A post-processor that adds many tokens to every text."""
    token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*[token] * pieces, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


def added(content: str, identifier: int) -> dict[str, Any]:
    """An added token."""
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], False)
    return {"id": identifier, "content": content, **flags}


def use(folder: Path, definition: dict[str, Any], text: str) -> str:
    """Writes the tokenizer into the folder and returns what happens when it is used."""
    checkpoints.write_tokenizer(folder)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return outcome(folder, text)


def outcome(path: Path, text: str) -> str:
    """Reads the tokenizer and encodes `text` in a process of its own; returns what happened."""
    done = subprocess.run(
        [sys.executable, "-c", USE, str(path), text], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-500:]
    said, took, held = json.loads(done.stdout)
    assert len(said) < 1000
    assert took < 5
    assert held < 1 << 30
    return said


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")

LONG_PIECE = unigram(vocab=[["<unk>", 0.0], ["a" * 300_000, -1.0]])
FOUR_REPLACES = [replace("a", "a" * 200)] * 4
EMPTY_REPLACES = [{**replace("", "b" * 64), "pattern": {"Regex": ""}}] * 3


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        pytest.param(LONG_PIECE, "300000 bytes", id="long piece"),
        pytest.param(
            bpe(normalizer=charsmap(b"\xfc\xff\xff\xff")), "precompiled_charsmap ends", id="charsmap's length"
        ),
        pytest.param(
            bpe(normalizer=charsmap(bytes(8) + b"x" * 100_000)), "100000 times longer", id="charsmap's texts"
        ),
        pytest.param(
            bpe(normalizer={"type": "Sequence", "normalizers": FOUR_REPLACES}),
            "1600000000 times longer",
            id="replaces",
        ),
        pytest.param(
            bpe(normalizer={"type": "Sequence", "normalizers": EMPTY_REPLACES}),
            "274625 times longer",
            id="replaces of nothing",
        ),
        pytest.param(
            bpe(decoder={"type": "Sequence", "decoders": FOUR_REPLACES}),
            "times longer",
            id="decoder's replaces",
        ),
        pytest.param(bpe(normalizer=nested("normalizers", 40)), "nested", id="nested normalizers"),
        pytest.param(bpe(pre_tokenizer=nested("pretokenizers", 40)), "nested", id="nested pre-tokenizers"),
        pytest.param(bpe(decoder=nested("decoders", 40)), "nested", id="nested decoders"),
        pytest.param(bpe(post_processor=nested("processors", 40)), "nested", id="nested post-processors"),
        pytest.param(bpe(post_processor=template(200_000)), "more than 4096 values", id="long template"),
        pytest.param(
            bpe(added_tokens=[added(chr(97 + i % 26) * 1_000_000, 500 + i) for i in range(40)]),
            "1000000 bytes",
            id="long added tokens",
        ),
        pytest.param(
            bpe(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}),
            "more than 64 steps",
            id="many normalizers",
        ),
        pytest.param(
            bpe(
                decoder={"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""},
            ),
            "regular expression",
            id="decoder's expression",
        ),
    ],
)
def test_a_file_that_asks_too_much_is_refused(tmp_path, definition, reason):
    said = use(tmp_path, definition, "a" * 10_000)
    assert said.startswith("CheckpointError")
    assert reason in said


@pytest.mark.parametrize(
    "expression", ["a*a*a*a*[^a ][^a ]", "(a|a)*[^a ]", "(?:a+)+$b", r"(a*)*\1[^a ]", "(?=(a*)*[^a ])a"]
)
@pytest.mark.parametrize("component", ["pre_tokenizer", "normalizer"])
def test_an_expression_that_backtracks_is_given_up(tmp_path, expression, component):
    step = split(expression)
    if component == "normalizer":
        step = {"type": "Replace", "pattern": step["pattern"], "content": "b"}
    said = use(tmp_path, bpe(**{component: step}), "a" * 10_000)
    assert said.startswith("ValueError: the tokenizer") or "ids" in said
    if expression.startswith("a*a*"):
        # Its limit of steps or its time is over, whichever comes first on this machine.
        assert said.startswith("ValueError: the tokenizer"), said


def test_growth_within_the_limits_is_carried_out(tmp_path):
    step = {"type": "Sequence", "normalizers": [replace("a", "b" * 30), replace("b", "c" * 30)]}
    said = use(tmp_path, bpe(normalizer=step), "a" * 500)
    assert said.startswith("450001 ids")


# Vocabularies in GGUF

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6


def gguf(path: Path, model: str, tokens: list[str], merges: list[str], kinds: dict[int, int]) -> Path:
    """Writes a vocabulary. `kinds` has the types of tokens that are not normal, by index."""

    def text(value: str) -> bytes:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data

    def array(kind: int, count: int, data: bytes) -> bytes:
        return struct.pack("<IIQ", 9, kind, count) + data

    types = struct.pack(f"<{len(tokens)}i", *(kinds.get(i, NORMAL) for i in range(len(tokens))))
    values = {
        "general.architecture": struct.pack("<I", 8) + text("llama"),
        "tokenizer.ggml.model": struct.pack("<I", 8) + text(model),
        "tokenizer.ggml.pre": struct.pack("<I", 8) + text("gpt-2"),
        "tokenizer.ggml.tokens": array(8, len(tokens), b"".join(map(text, tokens))),
        "tokenizer.ggml.token_type": array(5, len(tokens), types),
        "tokenizer.ggml.scores": array(6, len(tokens), struct.pack(f"<{len(tokens)}f", *range(len(tokens)))),
        "tokenizer.ggml.merges": array(8, len(merges), b"".join(map(text, merges))),
    }
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, len(values))
    path.write_bytes(header + b"".join(text(key) + value for key, value in values.items()))
    return path


BYTES = {"gpt2": checkpoints.VOCABULARY[:256], "llama": [f"<0x{byte:02X}>" for byte in range(256)]}
WORDS = ["".join(letters) for letters in itertools.product(LETTERS[:26], repeat=3)]


def pairs(count: int) -> tuple[list[str], list[str]]:
    """Words and their pairs as tokens, and the merges that make the pairs."""
    words = WORDS[: int(count**0.5)]
    both = list(itertools.product(words, words))
    return [*words, *(a + b for a, b in both)], [f"{a} {b}" for a, b in both]


def long_tokens(count: int) -> list[str]:
    """Tokens of 1,000 bytes, different from the first byte on."""
    return [WORDS[i % 17_000] * 333 + str(i // 17_000) for i in range(count)]


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("vocabulary", "kind", "said"),
    [
        pytest.param(lambda: (["a" * 300_000], []), NORMAL, "300000 bytes", id="long token"),
        pytest.param(lambda: (["a" * 300_000], []), CONTROL, "300000 bytes", id="long control token"),
        pytest.param(lambda: pairs(500_000), NORMAL, "ids", id="half a million merges"),
        pytest.param(lambda: pairs(1_000_000), NORMAL, "1001256 tokens", id="a million merges"),
        pytest.param(
            lambda: ([], ["a b"] * 1_100_000), NORMAL, "1100000 merges", id="a million unknown merges"
        ),
        pytest.param(
            lambda: ([f"<{i}>" for i in range(300_000)], []), CONTROL, "300000 tokens", id="control tokens"
        ),
        pytest.param(lambda: ([f"<{i}>" for i in range(200_000)], []), CONTROL, "ids", id="fewer of them"),
        pytest.param(lambda: (long_tokens(40_000), []), NORMAL, "ids", id="long tokens"),
        pytest.param(lambda: (long_tokens(3200), []), USER_DEFINED, "added tokens", id="long added tokens"),
        pytest.param(lambda: (long_tokens(2900), []), USER_DEFINED, "ids", id="fewer long added tokens"),
        pytest.param(lambda: (["a"] * 500_000, []), NORMAL, "ids", id="one token many times"),
        pytest.param(lambda: ([""] * 500_000, []), NORMAL, "ids", id="empty tokens"),
    ],
)
def test_a_gguf_vocabulary_answers_or_is_refused(tmp_path, model, vocabulary, kind, said):
    tokens, merges = vocabulary()
    tokens = [*BYTES[model], *tokens]
    kinds = dict.fromkeys(range(256, len(tokens)), kind)
    if model == "llama":
        kinds |= dict.fromkeys(range(256), BYTE)
    found = outcome(gguf(tmp_path / "it.gguf", model, tokens, merges, kinds), "aab " * 2500)
    assert said in found or (model == "llama" and "ids" in found)


def test_decoding_much_text_is_an_answer_or_an_error(tmp_path):
    tokens = [*BYTES["gpt2"], *long_tokens(1)]
    path = gguf(tmp_path / "it.gguf", "gpt2", tokens, [], {})
    script = USE.replace("tokenizer.encode(sys.argv[2])", "[256] * 4_000_000").replace("ids[:1000]", "ids")
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60)
    said = json.loads(done.stdout)[0]
    assert "no memory" in said or "4000000000 characters" in said
