"""Stopping early, and calls at the same time."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import candle_llama

PROMPTS = ["hello", "the world", "and a", "wording"]

# The child reports when it begins, when the interrupt reached it, and that the model still works.
INTERRUPTED = """
import json, sys, threading, time
import candle_llama

llm = candle_llama.load(sys.argv[1])
work = {
    "prefill": lambda: llm.generate([5] * 8000, max_new_tokens=1),
    "decode": lambda: llm.generate("Once upon a time", max_new_tokens=6000, ignore_eos=True),
    "batch": lambda: llm.generate(["Once upon a time"] * 20, max_new_tokens=6000, ignore_eos=True),
    "stream": lambda: [None for _ in llm.stream("Once upon a time", max_new_tokens=6000, ignore_eos=True)],
    "logits": lambda: llm.logits([5] * 8000, last=1),
    "encode": lambda: llm.tokenizer.encode("hello world " * 700_000),
    "tokenising": lambda: llm.generate("hello world " * 700_000, on_overflow="truncate_left"),
}[sys.argv[2]]
print("begun", flush=True)
try:
    work()
    print(json.dumps({"time": None}))
except KeyboardInterrupt:
    interrupted = time.monotonic()
    again = llm.generate("The capital of France is", max_new_tokens=1)
    print(json.dumps({"time": interrupted, "tokens": len(again.token_ids)}))
"""


def interrupt(model: Path, work: str) -> float:
    """Returns the seconds between SIGINT and KeyboardInterrupt."""
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(model), work], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "begun\n"
        time.sleep(0.4)
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        result = json.loads(child.stdout.readline())
    assert child.returncode == 0
    assert result["time"] is not None, "the work ended before it could be interrupted"
    assert result["tokens"] == 1
    return result["time"] - sent


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("work", ["prefill", "decode", "batch", "stream", "logits", "encode", "tokenising"])
def test_ctrl_c_returns_within_200_ms_and_leaves_the_model_usable(demo, work):
    # The fastest of three tries: the limit applies to this package, not to other load on the machine.
    delays = []
    while not delays or (min(delays) > 0.2 and len(delays) < 3):
        delays.append(interrupt(demo, work))
    assert min(delays) <= 0.2


def test_closing_a_stream_ends_it_and_stops_the_work(demo_llm):
    stream = demo_llm.stream("Once upon a time", max_new_tokens=4000, ignore_eos=True)
    assert next(stream).finish_reason is None
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()
    # The current step may finish; after that no processor time is used.
    time.sleep(0.2)
    worked = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - worked < 0.1


def test_closing_a_stream_cancels_a_running_prefill(demo_llm):
    chunks = []
    delays = []
    while not delays or (min(delays) > 0.2 and len(delays) < 3):
        stream = demo_llm.stream([5] * 8000, max_new_tokens=1, cache_salt=f"attempt {len(delays)}")
        thread = threading.Thread(target=lambda stream=stream: chunks.extend(stream))
        thread.start()
        time.sleep(0.4)
        began = time.monotonic()
        stream.close()
        delays.append(time.monotonic() - began)
        thread.join()
        assert chunks == [], "the prefill ended before the stream was closed"
    assert min(delays) <= 0.2


def test_a_timeout_includes_tokenising(demo_llm):
    options = {"timeout": 0.1, "on_overflow": "truncate_left", "logprobs": 1}
    text = "hello world " * 700_000
    began = time.monotonic()
    completion = demo_llm.generate(text, **options)
    assert (completion.finish_reason, completion.token_ids) == ("timeout", [])
    (chunk,) = demo_llm.stream(text, **options)
    assert (chunk.finish_reason, chunk.text, chunk.token_ids) == ("timeout", "", [])
    others = demo_llm.generate([text, [5] * 8000, text], **options)
    assert [other.finish_reason for other in others] == ["timeout"] * 3
    # A timeout during prefill has the same result, except for the number of the prompt's tokens.
    prefill = others[1]
    for other in [completion, others[0], others[2]]:
        assert dataclasses.replace(other, prompt_tokens=0, stats=prefill.stats) == dataclasses.replace(
            prefill, prompt_tokens=0
        )
    assert time.monotonic() - began < 3


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(demo_llm):
    text = "hello world " * 2_000_000
    began = time.monotonic()
    for use in (demo_llm.generate, demo_llm.score, demo_llm.stream):
        with pytest.raises(candle_llama.ContextLengthError) as caught:
            use(text)
        assert caught.value.context_length < caught.value.prompt_tokens < len(text)
    assert time.monotonic() - began < 2


# Ctrl-C arrives while the main thread closes a stream that another thread is reading.
INTERRUPTED_CLOSE = """
import os, signal, sys, threading, time
import candle_llama

llm = candle_llama.load(sys.argv[1])
chunks = []
stream = llm.stream([5] * 8000, max_new_tokens=1)
reader = threading.Thread(target=lambda: chunks.extend(stream))
reader.start()
time.sleep(0.4)
sent = None

def interrupt():
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

try:
    threading.Timer(0.02, interrupt).start()
    stream.close()
    time.sleep(5)
    raise SystemExit("no KeyboardInterrupt")
except KeyboardInterrupt:
    took = time.monotonic() - sent
    # On a busy machine it may come before the stream is closed.
    stream.close()
reader.join()
assert chunks == [], "the prefill ended before the stream was closed"
assert len(llm.generate("The capital of France is", max_new_tokens=1).token_ids) == 1
print(took)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_while_a_stream_is_closed(demo):
    delays = []
    while not delays or (min(delays) > 0.2 and len(delays) < 3):
        command = [sys.executable, "-c", INTERRUPTED_CLOSE, demo]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        delays.append(float(done.stdout))
    assert min(delays) <= 0.2


def test_leaving_a_with_block_closes_the_stream(demo_llm):
    with demo_llm.stream("Once upon a time", max_new_tokens=4000, ignore_eos=True) as stream:
        next(stream)
    assert list(stream) == []


def test_an_abandoned_stream_leaves_the_model_usable(llm):
    for chunk in llm.stream("hello", max_new_tokens=500, ignore_eos=True):
        assert chunk.finish_reason is None
        break
    assert len(llm.generate("hello", max_new_tokens=3, ignore_eos=True).token_ids) == 3


def test_generate_within_a_stream(llm):
    alone = llm.generate("hello", max_new_tokens=10, ignore_eos=True)
    other = llm.generate("the world", max_new_tokens=5, ignore_eos=True)
    tokens = []
    for chunk in llm.stream("hello", max_new_tokens=10, ignore_eos=True):
        tokens += chunk.token_ids
        assert llm.generate("the world", max_new_tokens=5, ignore_eos=True).token_ids == other.token_ids
    assert tokens == alone.token_ids


def test_two_interleaved_streams(llm):
    options = {"max_new_tokens": 10, "ignore_eos": True}
    pairs = list(zip(llm.stream("hello", **options), llm.stream("the world", **options), strict=False))
    for index, prompt in enumerate(["hello", "the world"]):
        tokens = [token for pair in pairs for token in pair[index].token_ids]
        assert tokens == llm.generate(prompt, **options).token_ids[: len(tokens)]
        assert len(tokens) > 5


def test_several_threads(llm):
    options = {"max_new_tokens": 30, "ignore_eos": True, "temperature": 1.0, "seed": 7}
    alone = [llm.generate(prompt, **options).token_ids for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: llm.generate(prompt, **options).token_ids, PROMPTS * 3))
    assert together == alone * 3


def test_other_python_threads_run_while_the_model_works(demo_llm):
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.01):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(done.set)
        # No other test has these tokens in the prefix cache.
        demo_llm.logits(list(range(1000, 2500)), last=1)
    # A thread that had to wait for the whole call would tick once or twice.
    assert ticks > (time.monotonic() - start) / 0.01 / 10
    assert ticks > 2


def test_closing_the_model_while_another_thread_generates(tiny):
    import candle_llama

    llm = candle_llama.load(tiny)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(llm.generate, "hello", max_new_tokens=1000, ignore_eos=True)
        llm.close()
        with contextlib.suppress(ValueError, candle_llama.CandleLlamaError):
            assert running.result(timeout=30).token_ids
    with pytest.raises((ValueError, candle_llama.CandleLlamaError)):
        llm.generate("hello", max_new_tokens=1)
