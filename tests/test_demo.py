"""The demo model, SmolLM2-135M-Instruct, gives its known results."""

import json
import subprocess
import sys

import pytest

import candle_llama

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_capital_of_france(demo_llm):
    answer = demo_llm.chat(QUESTION, max_new_tokens=32)
    assert "Paris" in answer.text
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)


def test_the_name_demo_is_that_file(demo):
    with candle_llama.load("demo") as llm:
        assert (llm.load_report.lm_head, llm.load_report.warnings) == ("tied", [])
        assert {name: entry.count for name, entry in llm.load_report.storage.items()} == {
            "Q4_1": 210,
            "F32": 61,
            "Q8_0": 1,
        }
        assert llm.config.num_hidden_layers == 30
        assert llm.config.rope_theta == 100000.0
        assert llm.config.max_position_embeddings == 8192


MEMORY = """
import json, sys
import candle_llama

def resident(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

files, own = resident("RssFile"), resident("RssAnon")
llm = candle_llama.load(sys.argv[1], context_length=1024)
files, loaded = resident("RssFile") - files, resident("RssAnon")
llm.logits([5] * 600, last=1)
isa, used = llm.load_report.isa, resident("RssAnon") - loaded
print(json.dumps({"isa": isa, "files": files, "loaded": loaded - own, "used": used}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_memory_is_as_estimated(demo):
    estimate = candle_llama.estimate_memory(demo, context_length=1024)
    # In a new process, which has no freed memory to reuse.
    child = subprocess.run(
        [sys.executable, "-c", MEMORY, str(demo)], capture_output=True, text=True, check=True
    )
    got = json.loads(child.stdout)
    if got["isa"] != "scalar":
        # Once weights are packed, the pages of the file are not needed any more.
        assert got["files"] < 0.1 * estimate.weights
        assert 0.9 < got["loaded"] / estimate.weights < 1.3
    # KV blocks and scratch buffers; a chunk of 512 rows uses nearly all of the scratch buffers.
    assert 0.6 * estimate.scratch < got["used"] < estimate.scratch + estimate.kv_cache


def test_greedy_is_reproducible_with_any_number_of_threads(demo, demo_llm):
    first = demo_llm.chat(QUESTION, max_new_tokens=32)
    assert demo_llm.chat(QUESTION, max_new_tokens=32).token_ids == first.token_ids
    with candle_llama.load(demo, threads=1) as single:
        assert single.chat(QUESTION, max_new_tokens=32).token_ids == first.token_ids


def test_stream_equals_generate(demo_llm):
    whole = demo_llm.generate("Once upon a time", max_new_tokens=40)
    chunks = list(demo_llm.stream("Once upon a time", max_new_tokens=40))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert len(chunks) > 10


def test_digits_are_single_tokens_and_special_tokens_are_known(demo_llm):
    tokenizer = demo_llm.tokenizer
    assert len(tokenizer.encode("2025")) == 4
    assert tokenizer.encode("<|im_start|>") == [1]
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (49152, 1, 2)
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}]
    )


def test_strict_accepts_it(demo):
    candle_llama.load(demo, strict=True).close()


@pytest.mark.parametrize("engine", ["tensor", "candle"])
def test_other_engines_answer_too(demo, engine):
    with candle_llama.load(demo, engine=engine, device="cpu") as llm:
        assert "Paris" in llm.chat(QUESTION, max_new_tokens=12).text
        assert llm.load_report.engine == engine


def test_timeout_ends_a_completion(demo_llm):
    out = demo_llm.generate("Once upon a time", max_new_tokens=4000, ignore_eos=True, timeout=0.5)
    assert out.finish_reason == "timeout"
    assert 0 < len(out.token_ids) < 4000
    assert out.stats.decode_seconds < 2


@pytest.mark.parametrize(
    "text", ["", " ", "naïve café", "😀 👩‍👩‍👧", "数字 123", "a\r\n\tb  c", "<|im_end|>"]
)
def test_decoding_undoes_encoding(demo_llm, text):
    ids = demo_llm.tokenizer.encode(text)
    assert demo_llm.tokenizer.decode(ids, skip_special_tokens=False) == text
