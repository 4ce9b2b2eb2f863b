"""The benchmark: its measurements and their order, skipped engines, and its reports."""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from candle_llama import _core, bench
from candle_llama.bench import command, contest, process, runner, setting, worker
from candle_llama.bench.engines import ENGINES
from candle_llama.bench.report import table
from candle_llama.bench.result import BenchResult, EngineResult, Run, Spread
from candle_llama.bench.roofline import Peaks, Roofline, Work
from candle_llama.bench.subject import Subject

# Bytes per second that the scripted worker measures.
READ_RATE = 2e9

# A worker that is controlled by files in its folder, and logs its requests.
SCRIPTED_WORKER = """
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
engine = None
rounds = 0
for line in sys.stdin:
    request = json.loads(line)
    engine = request.get("engine", engine)
    new_tokens = request.get("new_tokens", 0)
    with (folder / "log").open("a") as log:
        print(engine, request["do"], new_tokens, os.environ["OMP_NUM_THREADS"], file=log)
    if (folder / f"{{engine}}-{{request['do']}}-fails").exists():
        print(json.dumps({{"error": "RuntimeError: no\\nluck"}}), flush=True)
        continue
    if (folder / f"{{engine}}-{{request['do']}}-dies").exists():
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    answer = {{"peak_memory": 1000 + new_tokens}}
    if request["do"] == "load":
        answer |= {{"import_seconds": 1.0, "load_seconds": 2.0, "versions": {{engine: "1"}}}}
        answer |= {{"weights": "F32", "isa": "none"}}
    elif request["do"] == "peaks":
        rounds += (folder / "peaks-grow").exists()
        rate = {read_rate!r} * 2**rounds
        answer |= {{"isa": "avx2", "read_bytes_per_second": rate, "int8_operations_per_second": 4e9}}
        answer |= {{"bf16_operations_per_second": None, "f32_operations_per_second": 1e9}}
    else:
        ids = list(range(new_tokens))
        if engine == "numpy":
            ids[5:] = [9] * (new_tokens - 5)
        if (folder / f"{{engine}}-is-short").exists():
            ids.pop()
        answer |= {{"time_to_first_token": 0.5, "first_count": 2, "decode_seconds": 3.0, "token_ids": ids}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces the worker by the scripted one; returns the folder of its log and of the controlling files."""
    script = tmp_path / "worker.py"
    script.write_text(SCRIPTED_WORKER.format(folder=str(tmp_path), read_rate=READ_RATE))
    monkeypatch.setattr(process, "worker_module", SimpleNamespace(__file__=str(script)))
    monkeypatch.setattr(contest, "SETTLE_SECONDS", 0)
    return tmp_path


def log(scripted: Path) -> list[str]:
    return (scripted / "log").read_text().splitlines()


def set_available_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    doctor = {**setting._core.doctor(), "memory_available": available}
    monkeypatch.setattr(setting, "_core", SimpleNamespace(doctor=lambda: doctor))


def test_real_engines_read_the_same_prompts_and_are_timed(folder: Path) -> None:
    result = bench.run_bench(
        folder, against=["tensor", "candle", "numpy"], prompt_tokens=24, new_tokens=6, runs=2, threads=1
    )
    assert [engine.engine for engine in result.engines] == ["cpu", "tensor", "candle", "numpy"]
    assert (result.model, result.threads, result.rounds, result.together) == ("tiny", 1, 2, True)
    assert result.parameters == sum(values.size for values in tiny.tiny_tensors(tiny.tiny_config()).values())
    assert result.machine["isa"] == _core.doctor()["isa"]
    for engine in result.engines:
        assert engine.failed is None
        assert engine.skipped is None
        assert len(engine.runs) == 2
        assert engine.versions
        assert engine.load_seconds is not None
        assert engine.load_seconds.median > 0
        assert engine.peak_memory is not None
        assert 10e6 < engine.peak_memory < 2e9
        for run in engine.runs:
            assert run.prefill_tokens_per_second == pytest.approx(24 / run.time_to_first_token)
            assert run.decode_tokens_per_second is not None
            assert run.decode_tokens_per_second * run.decode_seconds <= 5.001
        # No engine rounds the weights of a float32 checkpoint, so all engines find the same tokens.
        assert [run.same_tokens for run in engine.runs] == [6, 6]
    assert result.engine("numpy").weights == "F32"
    json.dumps(dataclasses.asdict(result))


def test_real_engines_read_gguf(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf", matrix_type="Q8_0")
    result = bench.run_bench(path, against=["numpy"], prompt_tokens=8, new_tokens=3, runs=1)
    assert [engine.failed for engine in result.engines] == [None, None]
    assert result.engine("cpu").weights == "Q8_0"


def test_engines_alternate_and_each_round_begins_with_another_one(folder: Path, scripted: Path) -> None:
    bench.run_bench(folder, against=["numpy", "candle", "numpy"], new_tokens=8, runs=3, threads=7)
    warm_up = setting.WARM_UP_TOKENS
    assert [line.split()[0:3] for line in log(scripted)] == [
        step
        for engine in ("cpu", "numpy", "candle")
        for step in ([engine, "load", "0"], [engine, "run", str(warm_up)])
    ] + [
        [engine, "run", "8"]
        for engine in ("cpu", "numpy", "candle", "numpy", "candle", "cpu", "candle", "cpu", "numpy")
    ]
    assert {line.split()[3] for line in log(scripted)} == {"7"}


def test_engines_that_do_not_fit_together_take_turns(
    folder: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_available_memory(monkeypatch, setting.OVERHEAD_BYTES * 3 // 2)
    result = bench.run_bench(folder, against=["numpy"], new_tokens=8, runs=2)
    assert not result.together
    assert "took turns" in table(result)
    turn = ["load 0", f"run {setting.WARM_UP_TOKENS}", "run 8"]
    assert [line.rsplit(" ", 1)[0] for line in log(scripted)] == [
        f"{engine} {step}" for engine in ("cpu", "numpy", "numpy", "cpu") for step in turn
    ]


def test_an_engine_that_does_not_fit_at_all_is_skipped(
    folder: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_available_memory(monkeypatch, setting.OVERHEAD_BYTES - 1)
    result = bench.run_bench(folder, against=["numpy"])
    assert result.engine("numpy").skipped == "needs about 1.1 GB of memory, 1.1 GB are free"
    assert not (scripted / "log").exists()


def test_figures_are_computed_from_the_measurements(folder: Path, scripted: Path) -> None:
    result = bench.run_bench(folder, against=["numpy"], prompt_tokens=100, new_tokens=8, runs=2)
    numpy = result.engine("numpy")
    # Two of the eight tokens arrived at once, and six in the next three seconds.
    expected = Run(0.5, 200.0, 3.0, 2.0, same_tokens=5)
    assert numpy.runs == (expected, expected)
    assert numpy.decode_tokens_per_second == Spread(2.0, 2.0, 2.0)
    assert result.engine("cpu").runs[0].same_tokens == 8
    assert numpy.peak_memory == 1008
    assert numpy.load_seconds == Spread(2.0, 2.0, 2.0)
    assert numpy.versions == {"numpy": "1"}


@pytest.mark.parametrize(
    ("switch", "reason"),
    [
        ("numpy-load-fails", "RuntimeError: no luck"),
        ("numpy-run-fails", "RuntimeError: no luck"),
        ("numpy-run-dies", "its process ended: last words"),
        ("numpy-is-short", "gave 3 new tokens, not 4"),
    ],
)
def test_an_engine_that_fails_does_not_end_the_others(
    folder: Path, scripted: Path, switch: str, reason: str
) -> None:
    (scripted / switch).touch()
    result = bench.run_bench(folder, against=["numpy", "candle"], new_tokens=8, runs=2)
    assert result.engine("numpy").failed == reason
    assert result.engine("numpy").runs == ()
    assert len(result.engine("candle").runs) == 2
    assert f"numpy failed: {reason}" in table(result)


def test_when_the_first_engine_fails_the_next_is_the_reference(folder: Path, scripted: Path) -> None:
    (scripted / "cpu-run-dies").touch()
    result = bench.run_bench(folder, against=["numpy"], new_tokens=8, runs=1)
    assert result.engine("cpu").failed
    assert result.engine("numpy").runs[0].same_tokens == 8
    assert "cpu against" not in table(result)


def test_no_process_outlives_an_interrupt(folder: Path, scripted: Path) -> None:
    started: list[process.WorkerProcess] = []

    class Recording(process.WorkerProcess):
        def __init__(self, engine: str, threads: int) -> None:
            super().__init__(engine, threads)
            started.append(self)

    def interrupt(line: str) -> None:
        if line.startswith("numpy: run"):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest, "WorkerProcess", Recording)
        with pytest.raises(KeyboardInterrupt):
            bench.run_bench(folder, against=["numpy"], note=interrupt)
    assert [process.process.returncode is not None for process in started] == [True, True]


def test_peaks_are_measured_in_turn_with_the_engines(folder: Path, scripted: Path) -> None:
    bench.run_bench(folder, against=["numpy"], new_tokens=8, runs=3, threads=2, roofline=True)
    turns = [line.split()[0:2] for line in log(scripted)][4:]
    # The process that measures the peaks holds no engine.
    run = {"cpu": ["cpu", "run"], "numpy": ["numpy", "run"], "peaks": ["None", "peaks"]}
    order = ("cpu", "numpy", "peaks", "numpy", "peaks", "cpu", "peaks", "cpu", "numpy")
    assert turns == [run[name] for name in order]


def test_fractions_come_from_the_checkpoint_and_the_peaks(folder: Path, scripted: Path) -> None:
    result = bench.run_bench(
        folder, against=["numpy"], prompt_tokens=100, new_tokens=8, runs=2, roofline=True
    )
    roofline = result.roofline
    assert roofline is not None
    assert roofline.warnings == ()
    assert [one.read_bytes_per_second for one in roofline.rounds] == [READ_RATE, READ_RATE]
    tensors = tiny.tiny_tensors(tiny.tiny_config())
    body = sum(values.size for name, values in tensors.items() if name.endswith("_proj.weight"))
    head = tensors["model.embed_tokens.weight"].size
    assert roofline.work.bytes_per_token == 4 * (body + head)
    assert roofline.work.operations_per_prompt_token == {"F32": 2 * body}
    assert roofline.work.operations_per_prompt == {"F32": 2 * head}
    for engine in result.engines:
        # 2 tokens a second; 100 prompt tokens in half a second at 1e9 operations a second.
        assert engine.decode_of_bandwidth == pytest.approx(4 * (body + head) * 2 / READ_RATE)
        assert engine.prefill_of_peak == pytest.approx((200 * body + 2 * head) / 1e9 / 0.5)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["roofline"]["best"]["isa"] == "avx2"


def test_each_run_is_compared_with_the_peaks_of_its_round(folder: Path, scripted: Path) -> None:
    (scripted / "peaks-grow").touch()
    result = bench.run_bench(folder, against=[], new_tokens=8, runs=3, roofline=True)
    roofline = result.roofline
    assert roofline is not None
    assert [one.read_bytes_per_second / READ_RATE for one in roofline.rounds] == [2, 4, 8]
    assert roofline.best == roofline.rounds[2]
    [cpu] = result.engines
    assert cpu.decode_of_bandwidth == pytest.approx(roofline.work.bytes_per_token * 2 / (4 * READ_RATE))


@pytest.mark.parametrize(
    ("bf16", "type_name", "peak"),
    [(8.0, "Q4_0", 16.0), (8.0, "BF16", 8.0), (None, "BF16", 4.0), (8.0, "F16", 4.0), (8.0, "F32", 4.0)],
)
def test_each_type_of_weights_has_its_own_peak(bf16: float | None, type_name: str, peak: float) -> None:
    peaks = Peaks("avx512", 1.0, 16.0, bf16, 4.0)
    work = Work(0, {type_name: 10}, {"F32": 20})
    assert work.least_prefill_seconds(3, peaks) == pytest.approx(30 / peak + 20 / 4)


def test_quantised_weights_may_be_multiplied_as_floats_if_int8_is_slower() -> None:
    assert Work(0, {"Q4_0": 8}, {}).least_prefill_seconds(1, Peaks("scalar", 1.0, 1.0, None, 4.0)) == 2.0


def test_the_best_of_the_rounds_counts() -> None:
    rounds = [Peaks("avx2", 1.0, 5.0, None, 3.0), Peaks("avx2", 2.0, 4.0, 7.0, 2.0)]
    assert Peaks.best(rounds) == Peaks("avx2", 2.0, 5.0, 7.0, 3.0)


def test_an_untied_head_is_read_instead_of_the_embedding(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf", matrix_type="Q8_0", embedding_type="F16")
    tensors = dict(Subject.open(path).tensors)
    tied = Work.of(tensors)
    embedding = tensors["model.embed_tokens.weight"]
    assert tied.operations_per_prompt == {"F16": 2 * embedding.size}
    tensors["lm_head.weight"] = dataclasses.replace(embedding, type_name="Q8_0")
    untied = Work.of(tensors)
    assert untied.operations_per_prompt == {"Q8_0": 2 * embedding.size}
    assert tied.bytes_per_token - untied.bytes_per_token == 2 * embedding.size - embedding.size // 32 * 34
    with pytest.raises(ValueError, match=r"neither lm_head\.weight nor"):
        Work.of({})
    tensors["lm_head.weight"] = dataclasses.replace(embedding, type_name="F8_E4M3")
    with pytest.raises(ValueError, match="the size of F8_E4M3 is not known"):
        Work.of(tensors)


def test_a_fraction_above_1_is_called_a_bug(
    folder: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = scripted / "worker.py"
    script.write_text(SCRIPTED_WORKER.format(folder=str(scripted), read_rate=10.0).replace("e9", "e0"))
    words = (str(folder), "--against", "none", "--runs", "1", "--new-tokens", "8", "--roofline")
    assert run_command(*words) == 0
    printed = capsys.readouterr().out
    assert "warning: cpu: prefill is " in printed
    assert "warning: cpu: decode is " in printed
    assert "a bug in the measurement, unless a cache keeps the " in printed
    assert run_command(*words, "--json", "-") == 0
    captured = capsys.readouterr()
    over = json.loads(captured.out)["roofline"]["warnings"]
    assert len(over) == 2
    assert captured.err.splitlines() == [f"warning: {line}" for line in over]


@pytest.mark.parametrize(("megabytes", "excused"), [(84, True), (695, False), (1313, False)])
def test_a_cache_explains_a_fraction_above_1_only_if_it_can_hold_the_weights(
    megabytes: int, excused: bool
) -> None:
    [line] = Work(megabytes * 1_000_000, {}, {}).above_peak("cpu", None, 1.1)
    assert ("unless a cache keeps" in line) == excused


def test_peaks_that_cannot_be_measured_do_not_end_the_engines(
    folder: Path, scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scripted / "None-peaks-dies").touch()
    assert run_command(str(folder), "--against", "none", "--new-tokens", "8", "--roofline") == 1
    printed = capsys.readouterr().out
    assert "the machine's peaks were not measured: its process ended: last words" in printed
    assert "of bandwidth" not in printed
    assert "3 runs" in printed


def test_the_buffer_for_the_peaks_counts_as_memory(
    folder: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The buffer would take a quarter of this.
    set_available_memory(monkeypatch, setting.OVERHEAD_BYTES * 5 // 4)
    assert bench.run_bench(folder, against=[], new_tokens=8, runs=1).together
    assert not bench.run_bench(folder, against=[], new_tokens=8, runs=1, roofline=True).together


def test_real_peaks_are_measured_with_a_real_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "BUFFER_BYTES", 64 << 20)
    words = ("--prompt-tokens", "24", "--new-tokens", "6", "--runs", "1", "--threads", "1", "--json", "-")
    assert run_command(str(folder), "--against", "none", "--roofline", *words) == 0
    printed = json.loads(capsys.readouterr().out)
    best = printed["roofline"]["best"]
    assert best["isa"] in printed["machine"]["isa_available"]
    assert 1e8 < best["read_bytes_per_second"] < 1e13
    assert best["f32_operations_per_second"] > 1e7
    for figure in ("prefill_of_peak", "decode_of_bandwidth"):
        assert printed["engines"][0][figure] > 0


def test_ctrl_c_ends_the_measurement_of_the_peaks() -> None:
    program = (
        "import signal, threading, time\n"
        "from candle_llama import _core\n"
        "threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()\n"
        "try:\n"
        "    while True:\n"
        "        _core.roofline_peaks(threads=2, buffer_bytes=8 << 20)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout == "interrupted\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, not 0"),
        ({"runs": -1}, "runs must be at least 1, not -1"),
        ({"against": ["tensorflow"]}, "unknown engine 'tensorflow'"),
        ({"prompt_tokens": 1000, "new_tokens": 25}, "exceed the model's context of 1024"),
    ],
)
def test_bad_arguments_are_value_errors(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.run_bench(folder, **options)


def test_missing_packages_are_named_with_the_line_that_installs_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Subject.open(folder)
    file = Subject.open(tiny.write_gguf(tmp_path / "model.gguf"))
    installed: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert ENGINES["cpu"].reason_to_skip(directory) is None
    assert (
        ENGINES["transformers"].reason_to_skip(directory)
        == "torch, transformers not installed: pip install torch transformers"
    )
    assert (
        ENGINES["llama-cpp-python"].reason_to_skip(file)
        == "llama_cpp not installed: pip install llama-cpp-python"
    )
    assert ENGINES["xllamacpp"].reason_to_skip(file) == "xllamacpp not installed: pip install xllamacpp"
    installed |= {"torch", "transformers", "gguf", "llama_cpp"}
    assert ENGINES["transformers"].reason_to_skip(directory) is None
    assert ENGINES["transformers"].reason_to_skip(file) == "accelerate not installed: pip install accelerate"
    assert ENGINES["llama-cpp-python"].reason_to_skip(file) is None


def test_an_unreadable_format_is_reported_rather_than_a_missing_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (
        ENGINES["llama-cpp-python"].reason_to_skip(Subject.open(folder))
        == "reads GGUF files only, and tiny is a folder"
    )


def test_memory_counts_the_conversion_to_float32(tmp_path: Path) -> None:
    folder = Subject.open(tiny.write_checkpoint(tmp_path / "model", dtype="bfloat16"))
    file = Subject.open(tiny.write_gguf(tmp_path / "model.gguf", matrix_type="Q4_0"))
    assert ENGINES["numpy"].memory_needed(folder) == 4 * folder.parameters
    assert ENGINES["cpu"].memory_needed(folder) == folder.checkpoint_bytes < 2.2 * folder.parameters
    assert ENGINES["transformers"].memory_needed(folder) == folder.checkpoint_bytes
    assert ENGINES["transformers"].memory_needed(file) == 4 * file.parameters
    assert ENGINES["llama-cpp-python"].memory_needed(file) == file.checkpoint_bytes


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_prompts_hold_ordinary_tokens_and_depend_on_the_seed(tmp_path: Path, kind: str) -> None:
    path = (
        tiny.write_checkpoint(tmp_path / "model")
        if kind == "folder"
        else tiny.write_gguf(tmp_path / "m.gguf")
    )
    subject = Subject.open(path)
    prompt = subject.prompt(5000, (0, 1))
    special = {tiny.TOKEN_IDS[token] for token in tiny.SPECIAL_TOKENS}
    assert set(prompt) == set(range(tiny.VOCAB_SIZE)) - special
    assert prompt == subject.prompt(5000, (0, 1))
    assert prompt != subject.prompt(5000, (0, 2))


def test_prompts_leave_out_rows_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    config = tiny.tiny_config(vocab_size=tiny.VOCAB_SIZE + 21)
    subject = Subject.open(tiny.write_checkpoint(tmp_path / "padded", config))
    assert subject.token_ids.max() < tiny.VOCAB_SIZE - len(tiny.SPECIAL_TOKENS)
    assert Subject.open(
        tiny.write_checkpoint(tmp_path / "bare", config, tokenizer=False)
    ).token_ids.max() == (tiny.VOCAB_SIZE + 20)


def test_a_file_without_weights_or_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary\.gguf: 'token_embd\.weight' is missing"):
        Subject.open(tiny.write_gguf(tmp_path / "vocabulary.gguf", vocabulary_only=True))
    folder = tiny.write_checkpoint(tmp_path / "model", tiny.tiny_config(vocab_size=None), tensors={})
    with pytest.raises(ValueError, match="'vocab_size' is missing"):
        Subject.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError):
        Subject.open(folder)


def test_storage_type_is_that_of_most_weights(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "model.gguf", matrix_type="Q4_1", embedding_type="Q8_0")
    assert Subject.open(path).storage_type == "Q4_1"


def test_arrivals_count_the_tokens_that_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 11.0, 14.0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(clock))
    arrivals = worker.Arrivals()
    for token_ids in ([], [4, 5], [], [6], [7]):
        arrivals(token_ids)
    assert arrivals.token_ids == [4, 5, 6, 7]
    assert arrivals.started == 10.0
    assert arrivals.chunks == [(10.5, 2), (11.0, 1), (14.0, 1)]


def test_peak_memory_grows_with_what_is_touched() -> None:
    program = (
        "import runpy, sys\n"
        f"peak_memory = runpy.run_path({worker.__file__!r})['peak_memory']\n"
        "before = peak_memory()\n"
        "block = bytearray(b'1') * (64 << 20)\n"
        "print(peak_memory() - before, 'numpy' in sys.modules, 'candle_llama' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    grown, *imported = output.stdout.split()
    assert 60 << 20 < int(grown) < 200 << 20
    assert imported == ["False", "False"], "another engine's process must not hold them"


def test_importing_the_package_does_not_import_the_benchmark() -> None:
    program = (
        "import sys, candle_llama\n"
        "assert not [name for name in sys.modules if name.startswith('candle_llama.bench')]\n"
        "import candle_llama.bench\n"
        "assert not {'torch', 'transformers', 'llama_cpp', 'xllamacpp', 'gguf', 'matplotlib'} "
        "& set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def measured(engine: str, prefill: float, decode: float | None, same_tokens: int = 64) -> EngineResult:
    run = Run(512 / prefill, prefill, 1.0, decode, same_tokens)
    return EngineResult(
        engine,
        weights="BF16",
        load_seconds=Spread(0.5, 0.5, 0.5),
        peak_memory=1_234_000_000,
        runs=(run,),
        time_to_first_token=Spread.of([run.time_to_first_token]),
        prefill_tokens_per_second=Spread(prefill, prefill * 0.9, prefill * 1.1),
        decode_tokens_per_second=Spread.of([decode] if decode else []),
    )


def result_of(*engines: EngineResult) -> BenchResult:
    machine = {"cpu": "Some CPU", "isa": "avx2", "version": "1.2.3", "python": "3.11.7", "platform": "Linux"}
    return BenchResult("model", 135_000_000, 270_000_000, 512, 64, 1, "cpu", 2, 0, True, machine, engines)


def test_table_has_a_row_per_engine_and_compares() -> None:
    lines = table(
        result_of(
            measured("cpu", 600.0, 90.0),
            measured("numpy", 200.0, 12.0, same_tokens=60),
            EngineResult("llama-cpp-python", skipped="not there: install it"),
        )
    ).splitlines()
    assert lines == [
        "model: 135 M parameters, 270 MB",
        "512 prompt tokens, 64 new, 1 run, 2 threads; Some CPU, avx2",
        "candle-llama 1.2.3, Python 3.11.7, Linux",
        "",
        "                 load  first token  prefill  decode  peak    same",
        "engine  weights     s           ms    tok/s   tok/s    MB  tokens",
        "cpu     BF16     0.50          853      600      90  1234   64/64",
        "                                    540-660",
        "numpy   BF16     0.50         2560      200      12  1234   60/64",
        "                                    180-220",
        "llama-cpp-python was skipped: not there: install it",
        "",
        "cpu against numpy: prefill 3x, decode 7.5x",
    ]


def test_table_has_fractions_of_the_peaks() -> None:
    peaks = Peaks("avx512", 76.4e9, 1850e9, 930e9, 460e9)
    slow = dataclasses.replace(peaks, read_bytes_per_second=70e9)
    work = Work(76_000_000, {}, {})
    engine = dataclasses.replace(
        measured("cpu", 600.0, 90.0), prefill_of_peak=0.456, decode_of_bandwidth=0.789
    )
    result = dataclasses.replace(
        result_of(engine), roofline=Roofline(work, (slow, peaks), peaks, warnings=("too fast",))
    )
    assert table(result).splitlines()[3:] == [
        "peaks of these threads, avx512: memory 76.4 GB/s (rounds: 70-76.4), int8 1850, bf16 930, f32 460",
        "  Gop/s; decoding a token reads 76 MB",
        "",
        "                 load  first token  prefill    of  decode         of  peak    same",
        "engine  weights     s           ms    tok/s  peak   tok/s  bandwidth    MB  tokens",
        "cpu     BF16     0.50          853      600  0.46      90       0.79  1234   64/64",
        "                                    540-660",
        "warning: too fast",
    ]


def test_table_fits_100_columns() -> None:
    engine = EngineResult(
        "transformers",
        weights="BF16+Q8_0",
        load_seconds=Spread(23.45, 23.45, 23.45),
        peak_memory=123_456_000_000,
        runs=(Run(0.1, 1.0, 1.0, 1.0, 64),),
        time_to_first_token=Spread(12.3456, 11.3456, 13.3456),
        prefill_tokens_per_second=Spread(12345, 11345, 13345),
        decode_tokens_per_second=Spread(1234, 1034, 1334),
        prefill_of_peak=0.456,
        decode_of_bandwidth=0.789,
    )
    peaks = Peaks("avx512", 76.4e9, 1850e9, 930e9, 460e9)
    result = dataclasses.replace(
        result_of(engine), roofline=Roofline(Work(76_000_000, {}, {}), (peaks,), peaks)
    )
    lines = table(result).splitlines()
    assert max(map(len, lines)) <= 100
    assert "11346-13346" in "".join(lines)
    assert "1034-1334" in "".join(lines)


def test_table_without_decoding_or_without_results() -> None:
    text = table(result_of(measured("cpu", 600.0, None), measured("numpy", 300.0, None)))
    assert text.endswith("cpu against numpy: prefill 2x")
    assert table(result_of(EngineResult("cpu", failed="boom"))).splitlines()[3:] == ["", "cpu failed: boom"]


def run_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    parser.set_defaults(parser=parser)
    bench.add_arguments(parser)
    return bench.main(parser.parse_args(words))


def test_command_prints_one_json_object(
    folder: Path, scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(str(folder), "--against", "numpy", "--runs", "1", "--json", "-") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["prompt_tokens"] == 512
    assert printed["new_tokens"] == 64
    assert [engine["engine"] for engine in printed["engines"]] == ["cpu", "numpy"]
    assert printed["engines"][1]["runs"][0]["prefill_tokens_per_second"] == 1024


def test_command_writes_json_beside_the_table(
    folder: Path, scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = scripted / "result.json"
    words = ["--against", "none", "--new-tokens", "8", "--prompt-tokens", "16", "--threads", "2"]
    assert run_command(str(folder), *words, "--json", str(file)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("tiny: ")
    assert "16 prompt tokens, 8 new, 3 runs, 2 threads" in captured.out
    assert captured.err == "", "notes are for terminals"
    assert [engine["engine"] for engine in json.loads(file.read_text())["engines"]] == ["cpu"]


def test_command_fails_if_an_engine_does(folder: Path, scripted: Path) -> None:
    (scripted / "numpy-load-dies").touch()
    assert run_command(str(folder), "--against", "numpy") == 1


def test_command_writes_and_measures_synthetic_checkpoints(
    folder: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def write_synthetic(name: str, *, cache_dir: Path | None, note: Any) -> Path:
        asked.append((name, cache_dir))
        return folder

    monkeypatch.setattr(command, "write_synthetic", write_synthetic)
    assert run_command("--synthetic", "8b", "--against", "none", "--cache-dir", str(scripted)) == 0
    assert asked == [("8b", scripted)]
    assert capsys.readouterr().out.startswith("tiny: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments MODEL --synthetic is required"),
        (["model", "--synthetic", "1b"], "not allowed with"),
        (["--synthetic", "9b"], "invalid choice: '9b'"),
        (["--synthetic", "1b:Q9"], "no type 'Q9'"),
        (["model", "--against", "numpy,jax"], "'jax' is none of tensor, candle, numpy"),
        (["model", "--runs", "0"], "at least 1, not '0'"),
        (["model", "--threads", "two"], "must be a whole number"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(*words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_spread_is_median_minimum_and_maximum() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)
    assert Spread.of([]) is None
