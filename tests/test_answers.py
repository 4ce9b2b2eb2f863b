"""Where an answer begins and ends: the space after the prompt, truncated prompts, stop tokens, double BOS."""

import json
import warnings

import pytest

import candle_llama
import tiny as checkpoints

# A tiny Llama 2-like vocabulary: pieces that begin with a space are written with the mark.
PIECES = ["▁", "▁Paris", "Paris", "▁is", "is", "▁the", "a", "b", "!", "▁Lyon", "▁Rome"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
VOCABULARY = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]
IDS = {token: index for index, token in enumerate(VOCABULARY)}
PARIS = IDS["▁Paris"]


def write_sentence_piece_json(folder):
    """Llama 2's tokenizer.json with a tiny vocabulary."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": VOCABULARY[i], **special} for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [first, second],
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
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": True,
            "vocab": IDS,
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(file))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A model whose tokenizer puts a space before every text and removes it again."""
    config = checkpoints.tiny_config(vocab_size=len(VOCABULARY), bos_token_id=1, eos_token_id=2)
    folder = checkpoints.write_checkpoint(tmp_path_factory.mktemp("spaced") / "m", config, tokenizer=False)
    (folder / "generation_config.json").unlink()
    write_sentence_piece_json(folder)
    with candle_llama.load(folder) as llm:
        yield llm


def always(token, **options):
    return {"logit_bias": {token: 1000.0}, "max_new_tokens": 2, "ignore_eos": True, **options}


@pytest.mark.parametrize("prompt", ["Paris", "a", [1, PARIS], [IDS["<0x0A>"]], [IDS["b"]]])
def test_an_answer_keeps_the_space_after_the_prompt(spaced, prompt):
    out = spaced.generate(prompt, **always(PARIS))
    assert out.text == " Paris Paris"
    ids = spaced.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    before = spaced.tokenizer.decode(ids)
    assert spaced.tokenizer.decode([*ids, *out.token_ids]) == before + out.text
    chunks = [chunk.text for chunk in spaced.stream(prompt, **always(PARIS))]
    assert "".join(chunks) == out.text
    assert chunks[0] == " Paris"
    assert [o.text for o in spaced.generate([prompt, prompt], **always(PARIS))] == [out.text] * 2


def test_where_nothing_precedes_the_first_space_is_dropped(spaced):
    assert spaced.generate([1], **always(PARIS)).text == "Paris Paris"
    assert spaced.tokenizer.decode([PARIS, PARIS]) == "Paris Paris"
    messages = [{"role": "user", "content": "Paris"}]
    assert spaced.chat(messages, **always(PARIS)).text == "Paris Paris"
    assert "".join(chunk.text for chunk in spaced.stream_chat(messages, **always(PARIS))) == "Paris Paris"


def test_a_continued_message_keeps_its_space(spaced):
    messages = [{"role": "user", "content": "Paris"}]
    out = spaced.chat(messages, template_variables={"continue_final_message": True}, **always(PARIS))
    assert out.text == " Paris Paris"


def test_stop_strings_may_begin_with_that_space(spaced):
    out = spaced.generate("Paris", **always(PARIS, stop=" Paris"))
    assert (out.text, out.finish_reason, out.stop_reason) == ("", "stop", " Paris")
    assert len(out.token_ids) == 1


# Truncated prompts


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    config = checkpoints.tiny_config(max_position_embeddings=64)
    folder = checkpoints.write_checkpoint(tmp_path_factory.mktemp("short") / "m", config)
    with candle_llama.load(folder) as llm:
        yield llm


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, 63), ({"max_new_tokens": 20}, 63), ({"min_new_tokens": 20, "max_new_tokens": 30}, 44)],
)
def test_a_longer_prompt_never_keeps_less(short, options, limit):
    kept = []
    for length in range(30, 130):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stream = short.stream([5 + i for i in range(length)], on_overflow="truncate_left", **options)
            next(stream)
            stream.close()
        kept.append(length if not caught else int(str(caught[0].message).split(": ")[1].split()[0]))
        assert len(caught) == (length > limit)
    assert kept == [min(length, limit) for length in range(30, 130)]


def test_a_truncated_prompt_is_a_warning(short):
    with pytest.warns(UserWarning, match="first 37 of 100 tokens were cut.*63 are left, and room for 1"):
        out = short.generate([7] * 100, on_overflow="truncate_left")
    assert out.prompt_tokens == 63


# Stop tokens


@pytest.mark.parametrize("include", [False, True])
def test_a_special_token_as_stop_string_stops_at_that_token(llm, include):
    pad = checkpoints.TOKEN_IDS["<|pad|>"]
    options = {"logit_bias": {pad: 1000.0}, "max_new_tokens": 4, "include_stop_str": include}
    out = llm.generate("hello", stop=["world", "<|pad|>"], **options)
    assert (out.finish_reason, out.stop_reason) == ("stop", "<|pad|>")
    assert out.token_ids == [pad]
    assert out.text == ("<|pad|>" if include else "")
    assert "".join(c.text for c in llm.stream("hello", stop="<|pad|>", **options)) == out.text


def test_a_stop_string_that_begins_with_a_special_token_stops_at_that_token(llm):
    pad = checkpoints.TOKEN_IDS["<|pad|>"]
    options = {"logit_bias": {pad: 1000.0}, "max_new_tokens": 4}
    for stop in ("<|pad|>\n", "<|pad|>assistant"):
        out = llm.generate("hello", stop=stop, **options)
        assert (out.finish_reason, out.stop_reason, out.token_ids) == ("stop", stop, [pad])
    # Where special tokens are text, the whole stop string is looked for.
    out = llm.generate("hello", stop="<|pad|><|pad|>", skip_special_tokens=False, **options)
    assert (out.stop_reason, out.token_ids, out.text) == ("<|pad|><|pad|>", [pad, pad], "")
    assert llm.generate("hello", stop="x<|pad|>", **options).finish_reason == "length"


# BOS


def test_a_second_bos_is_a_warning_once(tiny):
    with candle_llama.load(tiny) as llm:
        with pytest.warns(UserWarning, match=r"begins with '<\|begin\|>'|begins with \"<\|begin\|>\""):
            llm.generate("<|begin|>hello", max_new_tokens=1)
        llm.generate("<|begin|>hello", max_new_tokens=1)
        llm.generate("hello", max_new_tokens=1)
