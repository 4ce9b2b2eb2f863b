"""When the system has no more memory, a call answers or raises; the process never dies.

Each case runs in a process of its own. After the model is loaded, the process limits its address space to
what it uses plus a margin, from none at all to enough, and makes one call per margin.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import candle_llama
import tiny as checkpoints
from side_by_side import side_by_side

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux only")

# Prints a line per margin: "answer" or the name of the error. Other errors are raised, which fails the test.
SCRIPT = """
import resource, sys, warnings
import numpy as np
import candle_llama

path, case, margins = sys.argv[1], sys.argv[2], map(float, sys.argv[3:])
warnings.simplefilter("ignore")
llm = candle_llama.load(path, threads=3, context_length=1024)
tokenizer = llm.tokenizer
tokenizer.encode("a")  # imports what the first use imports
messages = [{"role": "user", "content": "hello world"}]
tokenizer.apply_chat_template(messages)
prompt = [i % 250 for i in range(700)]
text = "the world and the other " * 90_000
vocab_size = llm.config.vocab_size

def stream():
    with llm.stream(prompt, max_new_tokens=8, ignore_eos=True) as chunks:
        return list(chunks)

CASES = {
    "generate": lambda: llm.generate(prompt, max_new_tokens=8, ignore_eos=True),
    "generate text": lambda: llm.generate("hello world", max_new_tokens=40, ignore_eos=True),
    "sample": lambda: llm.generate(prompt, max_new_tokens=8, temperature=1.0, top_p=0.9, min_p=0.01, seed=1),
    "stream": stream,
    "chat": lambda: llm.chat(messages, max_new_tokens=8),
    "score": lambda: llm.score(prompt),
    "loglikelihood": lambda: llm.loglikelihood(prompt[:400], prompt[400:]),
    "logits": lambda: llm.logits(prompt),
    "logprobs": lambda: llm.generate(prompt, max_new_tokens=8, ignore_eos=True, logprobs=vocab_size),
    "encode": lambda: tokenizer.encode(text),
    "decode": lambda: tokenizer.decode(prompt * 2000),
    "large prompt": lambda: llm.generate(text, max_new_tokens=1, on_overflow="truncate_left"),
    "chat template": lambda: tokenizer.apply_chat_template(
        messages, chat_template="{% for i in range(90000) %}{{ messages[0].content }}{{ i }} {% endfor %}"
    ),
    "long template": lambda: tokenizer.apply_chat_template(
        messages, chat_template="{% if true %}hello{% endif %} " * 1000 + "hello " * 30_000
    ),
    "generate_all": lambda: llm.generate([prompt[:40 + i] for i in range(60)], max_new_tokens=4),
    "quantize": lambda: candle_llama.quantize(
        path, path + ".quantized", "q8_0", force=True, allow_requantize=True
    ),
    "load": lambda: candle_llama.load(path, threads=3),
    "load quantised": lambda: candle_llama.load(path, threads=3, quantize="q8_0"),
    "load_tokenizer": lambda: candle_llama.load_tokenizer(path),
    "inspect": lambda: candle_llama._core.inspect(path),
}

def used():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmSize")).split()[1]) * 1024

for margin in margins:
    limit = used() + int(margin * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        CASES[case]()
        outcome = "answer"
    except (candle_llama.CandleLlamaError, MemoryError, OSError) as error:
        outcome = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(margin, outcome[:300], flush=True)

llm.generate("hello", max_new_tokens=2)
print("still works")
"""

CASES = [
    *("generate", "generate text", "sample", "stream", "chat", "score", "loglikelihood", "logits"),
    *("logprobs", "encode", "decode", "large prompt", "chat template", "long template", "generate_all"),
    *("quantize", "load", "load quantised", "load_tokenizer", "inspect"),
]
MARGINS = [0, 0.1, 0.3, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with a large vocabulary, one with wide layers, and the latter in packed blocks."""
    folder = tmp_path_factory.mktemp("models")
    vocabulary = checkpoints.tiny_config(vocab_size=100_000)
    wide = checkpoints.tiny_config(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=16
    )
    models = {
        "vocabulary": checkpoints.write_checkpoint(folder / "vocabulary", vocabulary, dtype="bfloat16"),
        "wide": checkpoints.write_checkpoint(folder / "wide", wide, dtype="bfloat16"),
        "packed": folder / "packed.gguf",
    }
    candle_llama.quantize(models["wide"], models["packed"], "q4_0", allow_requantize=True)
    return models


@pytest.fixture(scope="module")
def outcomes(request, models):
    def run(model, case):
        command = [sys.executable, "-c", SCRIPT, str(models[model]), case, *map(str, MARGINS)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    with side_by_side(request, "test_a_call_without_memory_answers_or_raises", run) as outcomes:
        yield outcomes


@pytest.mark.parametrize("model", ["vocabulary", "wide", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_a_call_without_memory_answers_or_raises(request, outcomes, model, case):
    done = outcomes[request.node.nodeid].result()
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    lines = done.stdout.splitlines()
    assert lines[-1] == "still works"
    assert lines[-2].endswith("answer"), lines


GROWTH = """
import sys
import candle_llama

def anonymous():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024

llm = candle_llama.load(sys.argv[1], threads=3)
llm.generate([1], max_new_tokens=1)
before = anonymous()
llm.generate([i % 250 for i in range(512)], max_new_tokens=2, ignore_eos=True)
print(anonymous() - before)
"""


@pytest.mark.parametrize("model", ["wide", "packed"])
def test_the_estimate_covers_the_buffers_of_all_threads(models, model):
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(models[model])], capture_output=True, text=True, check=True
    )
    estimate = candle_llama.estimate_memory(models[model], threads=3)
    assert 2**20 < int(done.stdout) < estimate.scratch + estimate.kv_cache
    assert estimate.scratch > candle_llama.estimate_memory(models[model], threads=1).scratch
