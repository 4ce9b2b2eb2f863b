"""Processes and threads: forks, spawning, pickling, cores, memory, and that no work keeps running."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import candle_llama
import tiny as checkpoints

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


def python(code: str, *arguments: object) -> Any:
    """Runs code in a process of its own and returns the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Forks

# Every child calls every method, none of which may hang, and then exits like any program.
FORKED = """
import json, os, signal, sys, threading, time
import candle_llama
from candle_llama import GenerationError

path, engine = sys.argv[1:]
llm = candle_llama.load(path, engine=engine, device="cpu", threads=4)
messages = [{"role": "user", "content": "hello"}]
begun = llm.stream("hello", max_new_tokens=5, ignore_eos=True)
next(begun)
shared = llm.stream("hello", max_new_tokens=900, ignore_eos=True)
done = threading.Event()

def step_the_stream():
    global shared
    while not done.is_set():
        for _ in shared:
            if done.is_set():
                return
        shared = llm.stream("hello", max_new_tokens=900, ignore_eos=True)

def generate():
    while not done.is_set():
        llm.generate([5] * 300, max_new_tokens=50, ignore_eos=True)

# Long enough that memory is held back for each call.
long_text = "hello " * 5000

def encode():
    while not done.is_set():
        llm.tokenizer.encode(long_text)

threads = [threading.Thread(target=work) for work in (step_the_stream, generate, generate, encode)]
for thread in threads:
    thread.start()

def outcome(call):
    try:
        call()
        return "worked"
    except GenerationError as error:
        return str(error)

outcomes = set()
for round in range(12):
    time.sleep(0.003 * round)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(40)
        found = [
            outcome(lambda: llm.generate("the", max_new_tokens=2)),
            outcome(lambda: llm.chat(messages, max_new_tokens=2)),
            outcome(lambda: llm.score("the world")),
            outcome(lambda: llm.logits([5, 6])),
            outcome(lambda: llm.stream("the")),
            outcome(lambda: next(begun)),
            outcome(lambda: next(shared)),
        ]
        assert llm.tokenizer.decode(llm.tokenizer.encode("hello")) == "hello"
        assert llm.tokenizer.decode(llm.tokenizer.encode(long_text)) == long_text
        assert llm.config.vocab_size > 0
        begun.close()
        shared.close()
        llm.close()
        if round == 0:
            again = candle_llama.load(path, engine="cpu", device="cpu")
            assert len(again.generate("the", max_new_tokens=3, ignore_eos=True).token_ids) == 3
        if round == 1 and engine != "cpu":
            try:
                candle_llama.load(path, engine=engine, device="cpu")
            except candle_llama.DeviceError as error:
                found.append(str(error))
        os.write(writing, json.dumps(found).encode())
        # Drop everything before the exit.
        del llm, begun, shared
        done.set()
        sys.exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        outcomes |= set(json.load(pipe))
    _, status = os.waitpid(pid, 0)
    assert status == 0, status

done.set()
for thread in threads:
    thread.join()
# The parent still works.
assert len(llm.generate("the", max_new_tokens=3, ignore_eos=True).token_ids) == 3
print(json.dumps(sorted(outcomes)))
"""


@FORKS
@pytest.mark.parametrize("engine", ["cpu", "tensor", "candle"])
def test_a_forked_child_gets_a_clear_error_and_never_hangs(tiny, engine):
    outcomes = python(FORKED, tiny, engine)
    forked = [outcome for outcome in outcomes if "forked" in outcome and "spawn" in outcome]
    assert outcomes == forked
    assert sum("load it again" in outcome for outcome in outcomes) == 1
    assert sum("Candle's threads" in outcome for outcome in outcomes) == (engine != "cpu")


# Follows code that says what a thread and the child do. The fork comes when the thread has begun.
FORK = """
thread = threading.Thread(target=in_thread)
thread.start()
begun.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    in_child()
    os._exit(0)
_, status = os.waitpid(pid, 0)
go_on.set()
thread.join()
print(json.dumps(status))
"""

# The child is forked while another thread makes the tokenizer.
FORKED_IN_A_PROPERTY = """
import json, os, signal, sys, threading
import candle_llama

llm = candle_llama.load(sys.argv[1], device="cpu")
parent, make = os.getpid(), candle_llama.llama.Tokenizer
begun, go_on = threading.Event(), threading.Event()

def make_slowly(*arguments):
    if os.getpid() == parent:
        begun.set()
        go_on.wait()
    return make(*arguments)

candle_llama.llama.Tokenizer = make_slowly

def in_thread():
    llm.tokenizer

def in_child():
    assert llm.tokenizer.decode(llm.tokenizer.encode("hello")) == "hello"
"""


@FORKS
def test_a_forked_child_makes_a_tokenizer_that_another_thread_was_making(tiny):
    assert python(FORKED_IN_A_PROPERTY + FORK, tiny) == 0


# The child is forked while another thread downloads.
FORKED_IN_A_DOWNLOAD = """
import json, os, signal, threading
from candle_llama import hub

begun, go_on = threading.Event(), threading.Event()

def in_thread():
    with hub._plain_names_only():
        begun.set()
        go_on.wait()

def in_child():
    with hub._plain_names_only():
        pass
"""


@FORKS
def test_a_forked_child_downloads_although_another_thread_was_downloading():
    assert python(FORKED_IN_A_DOWNLOAD + FORK) == 0


WORKERS = """
import concurrent.futures, json, multiprocessing, sys
import candle_llama

def tokens(llm, prompt):
    return llm.generate(prompt, max_new_tokens=5, ignore_eos=True, temperature=1.0, seed=1).token_ids

def inherited(prompt):
    try:
        return tokens(model, prompt)
    except candle_llama.GenerationError as error:
        return type(error).__name__

def refused(prompt):
    return tokens(model, prompt)

if __name__ == "__main__":
    path, method = sys.argv[1:]
    context = multiprocessing.get_context(method)
    model = candle_llama.load(path, threads=1, context_length=100)
    expected = [tokens(model, prompt) for prompt in ("the", "hello")]
    if method == "fork":
        with context.Pool(2) as pool:
            assert pool.map(inherited, ["the", "hello"]) == ["GenerationError"] * 2
        # The error comes back with its hint.
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
            try:
                executor.submit(refused, "the").result()
            except candle_llama.GenerationError as error:
                assert "spawn" in str(error)
                print(json.dumps("refused"))
    else:
        with context.Pool(2) as pool:
            got = pool.starmap(tokens, [(model, "the"), (model, "hello")])
        assert got == expected, got
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
            got = list(executor.map(tokens, [model, model], ["the", "hello"]))
        assert got == expected, got
        print(json.dumps("worked"))
"""


@FORKS
@pytest.mark.parametrize(
    ("method", "outcome"), [("spawn", "worked"), ("forkserver", "worked"), ("fork", "refused")]
)
def test_multiprocessing(tiny, tmp_path, method, outcome):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, script, str(tiny), method], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == outcome


# Pickling and copying


def test_copying_a_model_returns_the_same_object(llm):
    assert copy.copy(llm) is llm
    assert copy.deepcopy({"model": llm})["model"] is llm
    assert copy.copy(llm.tokenizer) is copy.deepcopy(llm.tokenizer) is llm.tokenizer


def test_a_pickled_model_keeps_its_options(tiny):
    options = {"compute": "exact", "threads": 1, "context_length": 77, "dtype": "bfloat16"}
    with candle_llama.load(tiny, **options) as llm:
        again = pickle.loads(pickle.dumps(llm))
        assert again is not llm
        assert (again.load_report.compute, again.load_report.threads) == ("exact", 1)
        assert again.config == llm.config
        assert again.load_report.storage == llm.load_report.storage
        assert again.score("hello the world") == llm.score("hello the world")
    # It is a model of its own: closing the other one has not closed it.
    again.close()


def test_a_stream_says_why_it_cannot_be_pickled(llm):
    stream = llm.stream("the", max_new_tokens=2)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="stream cannot be pickled"):
            attempt(stream)
    assert list(stream)


def test_results_can_be_pickled(llm):
    out = llm.generate("the", max_new_tokens=3, logprobs=2)
    assert pickle.loads(pickle.dumps(out)) == out
    chunks = list(llm.stream("the", max_new_tokens=3, logprobs=2))
    assert pickle.loads(pickle.dumps(chunks)) == chunks
    assert pickle.loads(pickle.dumps(llm.load_report)) == llm.load_report


# Threads


def test_many_threads_on_one_model_and_on_two(tiny, tmp_path):
    other = checkpoints.write_checkpoint(tmp_path / "other", checkpoints.tiny_config(num_hidden_layers=3))
    options = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 5, "logprobs": 1}
    prompts = ["hello", "the world", [5] * 700, "and a"]
    with candle_llama.load(tiny, compute="exact") as one, candle_llama.load(other, compute="exact") as two:

        def run(job: tuple[candle_llama.Llama, Any]) -> tuple[Any, ...]:
            model, prompt = job
            out = model.generate(prompt, **options)
            streamed = [token for chunk in model.stream(prompt, **options) for token in chunk.token_ids]
            assert streamed == out.token_ids
            return out.token_ids, out.logprobs, model.score(prompt).logprobs

        for models in ([one], [one, two]):
            jobs = [(model, prompt) for model in models for prompt in prompts]
            alone = [run(job) for job in jobs]
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(run, jobs * 3)) == alone * 3


def test_two_threads_on_one_stream_share_its_chunks(llm):
    options = {"max_new_tokens": 60, "ignore_eos": True}
    expected = llm.generate("the", **options).token_ids
    stream, tokens = llm.stream("the", **options), []

    def take() -> None:
        for chunk in stream:
            tokens.extend(chunk.token_ids)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tokens) == sorted(expected)


# Cores

THREADS = """
import json, os, sys
for step in sys.argv[2:]:
    exec(step)
import candle_llama
print(json.dumps([candle_llama.load(sys.argv[1]).load_report.threads, candle_llama._core.doctor()["quota"]]))
"""


@LINUX
def test_threads_honour_the_affinity(tiny):
    cores = sorted(os.sched_getaffinity(0))
    threads, _ = python(THREADS, tiny, f"os.sched_setaffinity(0, {cores[:1]})")
    assert threads == 1
    threads, quota = python(THREADS, tiny)
    usable = min(len(cores), max(1, int(quota or len(cores))))
    if Path(f"/sys/devices/system/cpu/cpu{cores[0]}/cpu_capacity").exists():
        assert 1 <= threads <= usable, "some cores may be slower"
    else:
        assert threads == usable


@pytest.fixture
def cgroup() -> Iterator[tuple[Path, Path]]:
    """A new cgroup in which a CPU quota can be set, and one nested in it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("cgroups need Linux")
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    v1 = next((path for _, names, path in lines if "cpu" in names.split(",")), None)
    v2 = next((path for _, names, path in lines if not names), "/")
    own = Path("/sys/fs/cgroup/cpu" if v1 else "/sys/fs/cgroup", (v1 or v2).lstrip("/"))
    outer = own / f"candle-llama-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        outer.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        if not any((outer / name).exists() for name in ("cpu.max", "cpu.cfs_quota_us")):
            pytest.skip("the cgroup that could be made has no CPU controller")
        inner.mkdir()
        yield outer, inner
    finally:
        for folder in (inner, outer):
            if folder.exists():
                folder.rmdir()


@LINUX
@pytest.mark.parametrize("cores", [1, 1.5])
def test_threads_honour_a_cgroup_s_quota(tiny, cgroup, cores):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is only one core")
    outer, inner = cgroup
    if (outer / "cpu.max").exists():
        (outer / "cpu.max").write_text(f"{int(cores * 100_000)} 100000")
    else:
        (outer / "cpu.cfs_period_us").write_text("100000")
        (outer / "cpu.cfs_quota_us").write_text(str(int(cores * 100_000)))
    join = f"open({str(inner / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
    assert python(THREADS, tiny, join) == [1, cores]


# Memory


def test_the_estimate_equals_what_loading_needs(tiny, demo_llm):
    for options in ({}, {"compute": "exact"}, {"dtype": "bfloat16"}, {"engine": "candle", "device": "cpu"}):
        estimate = candle_llama.estimate_memory(tiny, **options)
        with candle_llama.load(tiny, **options) as llm:
            assert estimate.weights == llm.load_report.bytes
            assert estimate.engine == llm.load_report.engine
            assert estimate.context_length == llm.config.max_position_embeddings
        assert estimate.total == estimate.weights + estimate.kv_cache + estimate.scratch
    demo = candle_llama.estimate_memory("demo", context_length=1024)
    assert demo.weights == demo_llm.load_report.bytes
    # 30 layers of 3 heads of 64, keys and values, two bytes each.
    assert demo.kv_cache == 30 * 3 * 64 * 2 * 2 * 1024
    assert (
        candle_llama.estimate_memory("demo", context_length=1024, compute="exact").kv_cache
        == 2 * demo.kv_cache
    )


def test_estimating_reads_no_weights(tmp_path):
    folder = checkpoints.write_checkpoint(tmp_path / "model")
    path = folder / "model.safetensors"
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    expected = candle_llama.estimate_memory(folder)
    # A sparse file of the same length, without the data.
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(header)
        file.truncate(size)
    assert candle_llama.estimate_memory(folder) == expected


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"context_length": 0}, ValueError),
        ({"context_length": 2**40}, ValueError),
        ({"context_length": "long"}, TypeError),
        ({"dtype": "int3"}, ValueError),
        ({"device": "tpu"}, candle_llama.DeviceError),
    ],
    ids=str,
)
def test_estimates_with_bad_options(tiny, options, error):
    with pytest.raises(error):
        candle_llama.estimate_memory(tiny, **options)


@LINUX
def test_a_context_beyond_the_memory_is_refused_before_anything_is_allocated(tmp_path):
    # 128 KiB of keys and values per token: 2 TiB.
    config = checkpoints.tiny_config(num_hidden_layers=16, num_key_value_heads=4, head_dim=256)
    folder = checkpoints.write_checkpoint(tmp_path / "model", config)
    options = {"context_length": 2**24, "compute": "exact"}
    with pytest.raises(candle_llama.DeviceError, match="context_length") as caught:
        candle_llama.load(folder, **options)
    error = caught.value
    assert error.device == "cpu"
    assert error.needed == candle_llama.estimate_memory(folder, **options).total > 2**41
    assert 0 < error.available < error.needed
    with candle_llama.load(folder) as llm:
        assert llm.generate("the", max_new_tokens=1)


LIMITED = """
import json, resource, sys
import candle_llama

path, spare = sys.argv[1], int(sys.argv[2])
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
try:
    candle_llama.load(path, context_length=8192, compute="exact", threads=1)
    print(json.dumps("loaded"))
except candle_llama.DeviceError as error:
    # The process was neither killed nor aborted, and still works.
    assert error.needed > error.available
    llm = candle_llama.load(path, context_length=256, threads=1)
    print(json.dumps(len(llm.generate("Once", max_new_tokens=4, ignore_eos=True).token_ids)))
"""


@LINUX
def test_a_limit_of_address_space_is_an_error_and_does_not_kill(demo):
    # The mapped file takes 92 MiB; keys and values would take 360 MiB.
    assert python(LIMITED, demo, 400 * 1024**2) == 4
    assert python(LIMITED, demo, 3000 * 1024**2) == "loaded"


# No work keeps running

WORK_AFTERWARDS = """
import json, sys, time
import candle_llama

llm = candle_llama.load(sys.argv[1])
long = {"max_new_tokens": 6000, "ignore_eos": True}

def close():
    stream = llm.stream("Once upon a time", **long)
    next(stream)
    stream.close()

def drop():
    for chunk in llm.stream("Once upon a time", **long):
        break

def leave():
    with llm.stream("Once upon a time", **long) as stream:
        next(stream)

def time_out():
    assert llm.generate("Once upon a time", timeout=0.2, **long).finish_reason == "timeout"

def time_out_while_reading():
    out = llm.generate([5] * 8000, timeout=0.2)
    assert (out.finish_reason, out.token_ids) == ("timeout", [])

def interrupt():
    import _thread, threading
    threading.Timer(0.2, _thread.interrupt_main).start()
    try:
        llm.generate("Once upon a time", **long)
    except KeyboardInterrupt:
        return
    raise AssertionError("not interrupted")

def fail():
    try:
        llm.generate([5] * 9000)
    except candle_llama.ContextLengthError:
        pass

def close_the_model():
    stream = llm.stream("Once upon a time", **long)
    next(stream)
    llm.close()

{"drop": drop, "close": close, "leave": leave, "timeout": time_out, "reading": time_out_while_reading,
 "interrupt": interrupt, "fail": fail, "model": close_the_model}[sys.argv[2]]()
# The current step may finish.
time.sleep(0.2)
worked = time.process_time()
time.sleep(0.6)
print(json.dumps(time.process_time() - worked))
"""


@pytest.mark.parametrize(
    "how", ["close", "drop", "leave", "timeout", "reading", "interrupt", "fail", "model"]
)
def test_no_work_keeps_running_after_an_early_end(demo, how):
    assert python(WORK_AFTERWARDS, demo, how) < 0.1


def test_a_timeout_ends_a_stream_and_a_batch_on_time(demo_llm):
    options = {"max_new_tokens": 4000, "ignore_eos": True, "timeout": 0.3}
    start = time.monotonic()
    chunks = list(demo_llm.stream("Once upon a time", **options))
    assert chunks[-1].finish_reason == "timeout"
    assert time.monotonic() - start < 1.5
    assert 0 < sum(len(chunk.token_ids) for chunk in chunks) < 4000
