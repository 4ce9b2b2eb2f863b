"""Malicious tokenizer.json files: each gives an answer or a typed error soon, within bounded memory."""

import base64
import json
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
    """Reads the tokenizer and encodes `text` in a process of its own; returns what happened."""
    checkpoints.write_tokenizer(folder)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    done = subprocess.run(
        [sys.executable, "-c", USE, str(folder), text], capture_output=True, text=True, timeout=60
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
