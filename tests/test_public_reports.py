"""Faults that users of other engines reported in public, as small cases; docs/compatibility.md lists them."""

import json
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
CONVERSATION = [{"role": "user", "content": "hello"}]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ggml-org/llama.cpp#9692: merges are pairs, or texts with a space


def test_merges_as_pairs_and_as_texts_give_the_same_ids(tmp_path):
    ids = []
    for name, spell in [("pairs", lambda merge: merge.split(" ")), ("texts", lambda merge: merge)]:
        folder = checkpoints.write_checkpoint(tmp_path / name)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["merges"] = [spell(merge) for merge in checkpoints.MERGES]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        file = tmp_path / f"{name}.gguf"
        candle_llama.quantize(folder, file, "f32")
        for source in (folder, file):
            ids.append(candle_llama.load_tokenizer(source).encode("hello the world and 00"))
    assert ids == [ids[0]] * 4
    assert len(ids[0]) < 10


# ggml-org/llama.cpp#13605: biased tokens are generated in spite of their bias


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_with_a_bias_of_minus_100_is_never_generated(llm, temperature):
    options = {**GREEDY, "temperature": temperature, "seed": 3, "repetition_penalty": 1.3}
    usual = llm.generate("hello", **options).token_ids
    banned = dict.fromkeys(usual, -100.0)
    found = llm.generate("hello", logit_bias=banned, **options).token_ids
    assert not set(found) & set(usual)


# huggingface/transformers#2302: a penalty raises the probability of tokens whose logit is negative.
# software-mansion-labs/private-mind#255: it grows with every occurrence.


def test_a_repetition_penalty_lowers_every_token_of_the_text_once(llm):
    def last(prompt: list[int]) -> np.ndarray:
        return llm.logits(prompt, last=1)[0]

    prompt = [7] * 40 + [9, 7]
    logits = last(prompt)
    penalised = logits.copy()
    for token in (7, 9):
        penalised[token] *= 5.0 if logits[token] < 0 else 1 / 5.0
    assert (penalised[[7, 9]] <= logits[[7, 9]]).all()
    # A bias brings each token just above, or just below, the best of the others.
    best = np.delete(penalised, [7, 9]).max()
    for token in (7, 9):
        for more, expected in [(0.01, True), (-0.01, False)]:
            bias = {token: float(best - penalised[token] + more), 16 - token: -100.0}
            out = llm.generate(prompt, repetition_penalty=5.0, logit_bias=bias, max_new_tokens=1)
            assert (out.token_ids == [token]) is expected


# vllm-project/vllm#7268: the tensor rope_freqs.weight of Llama 3.1 in GGUF


def test_rope_freqs_in_gguf_are_the_scaling_of_the_folder(tmp_path):
    config = checkpoints.tiny_config(rope_theta=50000.0, rope_scaling=checkpoints.LLAMA3_ROPE)
    folder = checkpoints.write_checkpoint(tmp_path / "model", config)
    candle_llama.quantize(folder, tmp_path / "it.gguf", "f32")
    ids = list(range(100))
    with candle_llama.load(folder) as one, candle_llama.load(tmp_path / "it.gguf") as other:
        assert other.load_report.warnings == []
        np.testing.assert_allclose(one.logits(ids), other.logits(ids), atol=1e-3)


# EricLBuehler/candle-vllm#277: dynamic scaling with both spellings of its type, and the original context
# outside of it


def test_dynamic_scaling_with_both_spellings(tmp_path):
    scaling = {"rope_type": "dynamic", "type": "dynamic", "factor": 8.0}
    both = checkpoints.tiny_config(rope_scaling=scaling, max_position_embeddings=64)
    one = checkpoints.tiny_config(rope_scaling={"type": "dynamic", "factor": 8.0}, max_position_embeddings=64)
    ids = list(range(100))
    with (
        candle_llama.load(checkpoints.write_checkpoint(tmp_path / "both", both)) as first,
        candle_llama.load(checkpoints.write_checkpoint(tmp_path / "one", one)) as second,
    ):
        np.testing.assert_array_equal(first.logits(ids), second.logits(ids))


# ggml-org/llama.cpp#3917: a file that holds only a vocabulary, loaded as a model


def test_a_vocabulary_without_a_model_is_named_as_such(tmp_path):
    path = checkpoints.write_gguf(tmp_path / "vocabulary.gguf", vocabulary_only=True)
    with pytest.raises(candle_llama.CheckpointError, match="vocabulary"):
        candle_llama.load(path)
    assert candle_llama.load_tokenizer(path).encode("hello")


# ggml-org/llama.cpp#9692, ollama/ollama#7038: GGUF without merges. The model still takes token ids.


def test_a_gguf_file_without_merges_runs_on_token_ids(tmp_path, monkeypatch):
    path = checkpoints.write_gguf(tmp_path / "it.gguf")
    raw = path.read_bytes()
    assert raw.count(b"tokenizer.ggml.merges") == 1
    path.write_bytes(raw.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.nothing"[:21]))
    with candle_llama.load(path) as llm:
        assert any("tokenizer.ggml.merges is missing" in note for note in llm.load_report.notes)
        assert len(llm.generate([1, 2, 3], **GREEDY).token_ids) == 12
        with pytest.raises(candle_llama.CheckpointError, match="merges"):
            llm.generate("hello")


# huggingface/text-generation-inference#2987: strftime_now. sgl-project/sglang#3296: date_string is a variable
# of the template. withcatai/node-llama-cpp#263: a template refuses the order of the roles.


def test_templates_with_dates(llm):
    template = (
        "{%- if not date_string is defined %}{% set date_string = strftime_now('%Y-%m-%d') %}{% endif -%}"
        "Today is {{ date_string }}. {{ messages[0]['content'] }}"
    )
    render = llm.tokenizer.apply_chat_template
    days = {datetime.now(UTC).date().isoformat(), datetime.now().date().isoformat()}
    assert render(CONVERSATION, chat_template=template)[9:19] in days
    text = render(CONVERSATION, chat_template=template, date_string="26 Jul 2024")
    assert text == "Today is 26 Jul 2024. hello"


def test_a_template_that_refuses_the_conversation_says_why(llm):
    template = (
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="roles must alternate user/assistant"):
        llm.chat(CONVERSATION * 2, chat_template=template)


# hiyouga/LlamaFactory#6803, foundation-model-stack/fastsafetensors#96: __metadata__ absent, empty or null


@pytest.mark.parametrize("metadata", [{}, None, {"format": "mlx"}, "absent"])
def test_safetensors_without_metadata(tmp_path, llm, metadata):
    folder = checkpoints.write_checkpoint(tmp_path / "model")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = {name: value for name, value in json.loads(raw[8:end]).items() if name != "__metadata__"}
    if metadata != "absent":
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])
    with candle_llama.load(folder) as other:
        assert other.generate("hello", **GREEDY).token_ids == llm.generate("hello", **GREEDY).token_ids


# huggingface/huggingface_hub#4728: the index names a tensor that its shard lacks. Neph0s/CoSER#3: it names
# shards that are not there, although others hold all tensors.


def test_an_index_that_does_not_fit_its_shards(tmp_path, llm):
    folder = checkpoints.write_checkpoint(tmp_path / "model", shards=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    edit(path, weight_map={**index["weight_map"], "mtp.fc.weight": shards[0]})
    expected = llm.generate("hello", **GREEDY).token_ids
    with candle_llama.load(folder) as other:
        assert any("mtp.fc.weight" in note for note in other.load_report.notes)
        assert other.generate("hello", **GREEDY).token_ids == expected
    stale = {name: shard.replace("-of-00003", "-of-00006") for name, shard in index["weight_map"].items()}
    edit(path, weight_map=stale)
    with pytest.raises(FileNotFoundError, match="-of-00006"):
        candle_llama.load(folder)
    path.write_text(json.dumps(index))
    with candle_llama.load(folder) as other:
        assert other.generate("hello", **GREEDY).token_ids == expected
