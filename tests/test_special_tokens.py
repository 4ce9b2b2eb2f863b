"""Tokens that only tokenizer_config.json or special_tokens_map.json lists, with the ids of transformers 5."""

import json

import pytest

import candle_llama
import tiny

A, B = tiny.VOCAB_SIZE, tiny.VOCAB_SIZE + 1
CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"


def token(content, special):
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, "special": special, **flags}


def decoder(**tokens):
    return {str(tiny.VOCAB_SIZE + i): token(f"<{name}>", tokens[name]) for i, name in enumerate(tokens)}


# Each with the ids of <a> and <b> (None: ordinary text), and the text that decoding gives.
CASES = {
    "list": ([(CONFIG, {"extra_special_tokens": ["<a>", "<b>"]})], A, B, "hello the"),
    "dict": ([(CONFIG, {"extra_special_tokens": {"image_token": "<a>", "b": "<b>"}})], A, B, "hello the"),
    "role": ([(CONFIG, {"image_token": "<a>", "extra_special_tokens": ["<b>"]})], A, B, "hello the"),
    "older": ([(CONFIG, {"additional_special_tokens": ["<a>", "<b>"]})], A, B, "hello the"),
    "map": ([(MAP, {"additional_special_tokens": ["<a>", "<b>"]})], A, B, "hello the"),
    "map and config": (
        [(CONFIG, {"extra_special_tokens": ["<a>"]}), (MAP, {"extra_special_tokens": ["<b>"]})],
        A,
        B,
        "hello the",
    ),
    "decoder": ([(CONFIG, {"added_tokens_decoder": decoder(b=True, a=False)})], B, A, "hello the<a>"),
    "decoder and list": (
        [(CONFIG, {"added_tokens_decoder": decoder(b=False), "extra_special_tokens": ["<b>", "<a>"]})],
        B,
        A,
        "hello <b>the",
    ),
    "both names": (
        [(CONFIG, {"additional_special_tokens": ["<a>"], "extra_special_tokens": ["<b>"]})],
        None,
        A,
        "hello the<a>",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_listed_tokens_have_the_ids_of_transformers(name, tmp_path):
    files, a, b, text = CASES[name]
    folder = tiny.write_checkpoint(tmp_path / "model")
    for file, changes in files:
        path = folder / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **changes}))
    tokenizer = candle_llama.load_tokenizer(folder)
    plain = tokenizer.encode("<a>", split_special_tokens=True)[-3:]
    words = [tokenizer.encode(word, add_special_tokens=False) for word in ("hello ", "the")]
    ids = tokenizer.encode("hello <b>the<a>", add_special_tokens=False)
    assert ids == [*words[0], b, *words[1], *([a] if a is not None else plain)]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"eot_token": "<a>", "extra_special_tokens": {"image_token": "<b>"}}, "<a>|<b>"),
        ({"eot_token": {"content": "<a>"}, "add_bos_token": True}, "<a>|"),
        ({"extra_special_tokens": ["<a>", "<b>"], "pad_token": None}, "|"),
    ],
)
def test_templates_see_the_models_own_tokens(fields, expected, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model")
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    tokenizer = candle_llama.load_tokenizer(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        chat_template="{{ eot_token }}|{{ image_token }}{{ add_bos_token }}",
    )
    assert text == expected
