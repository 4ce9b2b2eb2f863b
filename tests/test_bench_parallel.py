"""`bench --parallel`: clients that use an engine at the same time, and its report."""

import dataclasses
import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from candle_llama import cli
from candle_llama.bench import parallel, setting, worker
from candle_llama.bench.contest import Contestant
from candle_llama.bench.engines import ENGINES
from candle_llama.bench.parallel import (
    ParallelEngineResult,
    ParallelResult,
    Percentiles,
    Request,
    run_parallel,
    token_gaps,
)
from candle_llama.bench.report import parallel_table
from candle_llama.bench.subject import Subject


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf", matrix_type="Q8_0")


def run_command(*words: str) -> int:
    return cli.main(["bench", *words])


def test_two_clients_use_a_real_engine(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--parallel", "2", "--requests", "3", "--prompt-tokens", "24", "--new-tokens", "6")
    assert run_command(str(model), *words, "--threads", "1", "--against", "none", "--json", "-") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["clients"], printed["requests_per_client"], printed["threads"]) == (2, 3, 1)
    [engine] = printed["engines"]
    assert (engine["engine"], engine["failed"], engine["skipped"]) == ("cpu", None, None)
    assert engine["requests_per_second"] == pytest.approx(6 / engine["seconds"])
    assert engine["output_tokens_per_second"] == pytest.approx(36 / engine["seconds"])
    for figure in ("time_to_first_token", "token_gap"):
        assert 0 < engine[figure]["median"] <= engine[figure]["p90"] <= engine[figure]["p99"]
    requests = engine["requests"]
    assert [request["client"] for request in requests] == [0, 0, 0, 1, 1, 1]
    assert engine["seconds"] == max(request["ended"] for request in requests)
    for before, after in ((0, 1), (1, 2), (3, 4), (4, 5)):
        assert requests[before]["ended"] <= requests[after]["started"]
    assert all(0 < request["time_to_first_token"] < request["ended"] for request in requests)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
def test_xllamacpp_serves_the_same_requests(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf", tiny.gguf_config(), matrix_type="Q8_0")
    options: dict[str, Any] = {"prompt_tokens": 24, "new_tokens": 6, "threads": 1, "against": ["xllamacpp"]}
    _, engine = run_parallel(path, clients=3, requests=2, **options).engines
    assert (engine.failed, engine.skipped) == (None, None)
    assert len(engine.requests) == 6
    assert engine.output_tokens_per_second == pytest.approx(36 / (engine.seconds or 0))


def test_every_request_has_another_prompt_and_every_engine_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def take_turns(contestants: list[Contestant], rounds: list[Any], together: bool, note: Any) -> None:
        assert not together, "idle engines must not disturb the one that is measured"
        [[request]] = rounds
        asked.extend([*(contestant.warm_up_request for contestant in contestants), request])
        for contestant in contestants:
            contestant.failed = "not run"

    monkeypatch.setattr(parallel, "take_turns", take_turns)
    run_parallel(model, clients=3, requests=2, against=[], prompt_tokens=16, new_tokens=8)
    warm_up, counted = asked
    assert [len(client) for client in warm_up["clients"]] == [1, 1, 1]
    assert [len(client) for client in counted["clients"]] == [2, 2, 2]
    assert (warm_up["new_tokens"], counted["new_tokens"]) == (setting.WARM_UP_TOKENS, 8)
    prompts = [tuple(prompt) for request in asked for client in request["clients"] for prompt in client]
    assert {len(prompt) for prompt in prompts} == {16}
    assert len({prompt[:4] for prompt in prompts}) == len(prompts) == 9


def test_tokens_that_arrive_together_share_the_time_since_the_arrival_before() -> None:
    assert token_gaps([(1.0, 1), (2.0, 1), (5.0, 3), (5.5, 1)]) == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert token_gaps([(1.0, 7)]) == []


def test_percentiles_are_measured_values() -> None:
    assert Percentiles.of([float(value) for value in range(100, 0, -1)]) == Percentiles(50.5, 90.0, 99.0)
    assert Percentiles.of([3.0, 1.0]) == Percentiles(2.0, 3.0, 3.0)
    assert Percentiles.of([2.0]) == Percentiles(2.0, 2.0, 2.0)
    assert Percentiles.of([]) is None


def test_figures_are_computed_from_the_arrivals() -> None:
    served = [
        {"client": 0, "started": 10.0, "ended": 13.0, "chunks": [[11.0, 1], [12.0, 1], [13.0, 1]]},
        {"client": 1, "started": 10.0, "ended": 14.0, "chunks": [[13.0, 2], [14.0, 1]]},
    ]
    load = {"versions": {"a": "1"}, "isa": "none", "load_seconds": 0.5}
    answers = [[{"began": 10.0, "requests": served}]]
    result = parallel._result(Contestant("cpu", {}, {}, loads=[load], answers=answers), "Q4_0", 3)
    assert result.requests == (Request(0, 0.0, 3.0, 1.0), Request(1, 0.0, 4.0, 3.0))
    assert (result.seconds, result.requests_per_second) == (4.0, 0.5)
    assert result.output_tokens_per_second == 1.5
    assert result.time_to_first_token == Percentiles(2.0, 3.0, 3.0)
    assert result.token_gap == Percentiles(1.0, 1.0, 1.0)
    assert result.weights == "Q4_0"


class FakeAdapter:
    """Streams `new_tokens` tokens, one by one, after a step that a test chooses."""

    def __init__(self, step: Callable[[list[int]], object]) -> None:
        self.step = step

    def run(self, prompt: list[int], new_tokens: int, arrived: worker.Arrived) -> None:
        self.step(prompt)
        for token_id in range(new_tokens):
            arrived([token_id])


def serve(step: Callable[[list[int]], object], clients: list[list[list[int]]]) -> dict[str, Any]:
    process = worker.Worker()
    process.adapter = FakeAdapter(step)  # type: ignore[assignment]
    return process.serve({"clients": clients, "new_tokens": 2})


def test_clients_work_at_the_same_time() -> None:
    # It would wait for ever if the clients came one after the other.
    meet = threading.Barrier(3, timeout=30)
    answer = serve(lambda _: meet.wait(), [[[1], [2]], [[3], [4]], [[5], [6]]])
    assert [request["client"] for request in answer["requests"]] == [0, 0, 1, 1, 2, 2]
    assert all([count for _, count in request["chunks"]] == [1, 1] for request in answer["requests"])
    assert all(request["started"] >= answer["began"] for request in answer["requests"])


def test_a_client_that_fails_ends_the_others() -> None:
    failed, prompts = threading.Event(), []

    def step(prompt: list[int]) -> None:
        prompts.append(prompt)
        if prompt == [1]:
            failed.set()
            raise RuntimeError("no luck")
        failed.wait(30)

    with pytest.raises(RuntimeError, match="no luck"):
        serve(step, [[[1], [2]], [[3]] * 10_000])
    assert [2] not in prompts
    assert len(prompts) < 10_000


def test_clients_of_llama_cpp_python_wait_for_its_only_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []

    class Llama:
        def __init__(self, **_: Any) -> None:
            pass

        def reset(self) -> None:
            assert not inside

        def generate(self, prompt: list[int], **_: Any) -> Iterator[int]:
            inside.append(1)
            try:
                while True:
                    yield prompt[0]
            finally:
                inside.pop()

    module = SimpleNamespace(Llama=Llama, llama_print_system_info=lambda: b"")
    monkeypatch.setitem(sys.modules, "llama_cpp", module)  # type: ignore[arg-type]
    process = worker.Worker()
    process.adapter = worker.LlamaCpp()
    process.adapter.load(worker.Task(Path("a.gguf"), "cpu", threads=1, clients=4, context_length=64))
    answer = process.serve({"clients": [[[client]] * 20 for client in range(4)], "new_tokens": 3})
    assert len(answer["requests"]) == 80
    assert ENGINES["llama-cpp-python"].one_at_a_time


class FakeServer:
    """xllamacpp's server, as far as the benchmark uses it."""

    chunks: tuple[dict[str, Any], ...] = ()

    def __init__(self, params: Any) -> None:
        self.params = params
        self.requests: list[dict[str, Any]] = []

    def handle_completions(self, request: dict[str, Any], callback: Callable[[dict[str, Any]], None]) -> None:
        self.requests.append(request)
        for chunk in self.chunks:
            callback(chunk)


@pytest.fixture
def xllamacpp(monkeypatch: pytest.MonkeyPatch) -> worker.XLlamaCpp:
    def params() -> SimpleNamespace:
        pools = {name: SimpleNamespace() for name in ("model", "cpuparams", "cpuparams_batch")}
        return SimpleNamespace(**pools)

    module = SimpleNamespace(CommonParams=params, Server=FakeServer, get_system_info=lambda: "AVX2 = 1 \n")
    monkeypatch.setitem(sys.modules, "xllamacpp", module)  # type: ignore[arg-type]
    adapter = worker.XLlamaCpp()
    task = worker.Task(Path("a.gguf"), "cpu", threads=2, clients=4, context_length=100)
    assert adapter.load(task) == {"isa": "AVX2 = 1"}
    return adapter


def test_xllamacpp_has_a_slot_for_each_client(xllamacpp: worker.XLlamaCpp) -> None:
    params = xllamacpp.server.params
    assert (params.n_parallel, params.n_ctx, params.kv_unified, params.cache_ram_mib) == (4, 400, False, 0)
    assert params.cpuparams.n_threads == params.cpuparams_batch.n_threads == 2


def test_xllamacpp_counts_tokens_whose_text_is_held_back(
    xllamacpp: worker.XLlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = tuple({"timings": {"predicted_n": total}} for total in (1, 4, 5, 5))
    monkeypatch.setattr(FakeServer, "chunks", chunks)
    arrivals = worker.Arrivals()
    xllamacpp.run([7, 8], 5, arrivals)
    assert [count for _, count in arrivals.chunks] == [1, 3, 1]
    [request] = xllamacpp.server.requests
    assert (request["prompt"], request["max_tokens"], request["cache_prompt"]) == ([7, 8], 5, False)
    assert request["ignore_eos"]


def test_an_error_of_xllamacpp_is_raised(
    xllamacpp: worker.XLlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeServer, "chunks", ({"error": {"code": 400, "message": "too long"}},))
    with pytest.raises(RuntimeError, match="too long"):
        xllamacpp.run([7], 5, worker.Arrivals())


def test_memory_counts_the_keys_and_values_of_every_client(model: Path) -> None:
    subject = Subject.open(model)
    config = tiny.gguf_config()
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rows = config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    assert subject.kv_bytes_per_token == 2 * 2 * rows
    needed = setting._memory_needed("cpu", subject, 1000, 1)
    assert setting._memory_needed("cpu", subject, 1000, 5) == needed + 4 * 1000 * subject.kv_bytes_per_token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 0}, "clients must be at least 1, not 0"),
        ({"clients": 2, "requests": 0}, "requests must be at least 1, not 0"),
        ({"clients": 2, "against": ["numpy"]}, "unknown engine 'numpy': choose from xllamacpp"),
        ({"clients": 2, "prompt_tokens": 1000}, "exceed the model's context of 1024"),
    ],
)
def test_bad_arguments_are_value_errors(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_parallel(model, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel", "0"], "at least 1, not '0'"),
        (["--parallel", "2", "--runs", "3"], "argument --parallel: not allowed with argument --runs"),
        (["--parallel", "2", "--roofline"], "argument --parallel: not allowed with argument --roofline"),
        (["--parallel", "2", "--format", "md"], "argument --parallel: not allowed with argument --format"),
        (["--parallel", "2", "--against", "numpy"], "'numpy' is none of xllamacpp, llama-cpp-python"),
        (["--requests", "2"], "--requests needs --parallel"),
        (["--against", "xllamacpp"], "'xllamacpp' is none of tensor, candle, numpy"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command("model", *words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def measured(engine: str, speed: float, first: float, gap: float) -> ParallelEngineResult:
    return ParallelEngineResult(
        engine,
        one_at_a_time=ENGINES[engine].one_at_a_time,
        weights="Q4_0",
        peak_memory=1_234_000_000,
        requests=(Request(0, 0.0, 1.0, first),),
        seconds=1.0,
        requests_per_second=speed / 64,
        output_tokens_per_second=speed,
        time_to_first_token=Percentiles(first, first * 2, first * 3),
        token_gap=Percentiles(gap, gap * 2, gap * 30),
    )


def result_of(*engines: ParallelEngineResult, clients: int = 2) -> ParallelResult:
    machine = {"cpu": "CPU", "isa": "isa", "version": "1.2.3", "python": "3.11.7", "platform": "Linux"}
    sizes = (135_000_000, 270_000_000)
    return ParallelResult("model", *sizes, clients, 4, 512, 64, "cpu", 2, 0, machine, engines)


def test_table_has_a_row_per_engine_and_compares() -> None:
    result = result_of(
        measured("cpu", 320.0, 0.25, 0.01),
        ParallelEngineResult("xllamacpp", skipped="not there: install it"),
        measured("llama-cpp-python", 32.0, 2.5, 0.008),
    )
    assert parallel_table(result).splitlines() == [
        "model: 135 M parameters, 270 MB",
        "2 clients, each 4 requests one after the other; 512 prompt tokens, 64 new, 2 threads; CPU, isa",
        "candle-llama 1.2.3, Python 3.11.7, Linux",
        "every request has another prompt, so that prefix caches do not help",
        "",
        "                           requests  output  first token             token gap               peak",
        "engine            weights        /s   tok/s     median s  p90   p99   median s    p90   p99    MB",
        "cpu               Q4_0            5     320         0.25  0.5  0.75       0.01   0.02   0.3  1234",
        "llama-cpp-python  Q4_0          0.5      32          2.5    5   7.5      0.008  0.016  0.24  1234",
        "llama-cpp-python serves one request at a time: its clients wait for each other",
        "xllamacpp was skipped: not there: install it",
        "",
        "cpu relative to llama-cpp-python: output 10x, first token 0.1x, token gap 1.25x",
    ]


def test_table_of_one_client_or_without_results() -> None:
    alone = dataclasses.replace(measured("llama-cpp-python", 32.0, 2.5, 0.008), token_gap=None)
    text = parallel_table(result_of(alone, ParallelEngineResult("cpu", failed="boom"), clients=1))
    assert "one request at a time" not in text
    assert text.endswith("cpu failed: boom")


def test_command_fails_if_an_engine_does(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = result_of(measured("cpu", 1.0, 1.0, 1.0), ParallelEngineResult("xllamacpp", failed="boom"))
    monkeypatch.setattr("candle_llama.bench.command.run_parallel", lambda *_, **__: failed)
    assert run_command(str(model), "--parallel", "2") == 1
