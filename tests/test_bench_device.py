"""`bench --device`: which engines run on a GPU, what is refused, and what the reports say.

The GPU is a stand-in: a name in the list of devices, and engines that only tell what they are asked.
"""

import contextlib
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from candle_llama import DeviceError, _core, bench, cli
from candle_llama.bench import command, llama_bench, parallel, runner, setting, worker
from candle_llama.bench.contest import Contestant
from candle_llama.bench.engines import ENGINES
from candle_llama.bench.llama_bench import FORMATS
from candle_llama.bench.report import parallel_table, table

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, hardly any memory of the CPU, and all packages."""
    doctor = {**_core.doctor(), "devices": ["cpu", "cuda:0", "cuda:1"], "memory_available": 1000}
    monkeypatch.setattr(setting, "_core", SimpleNamespace(doctor=lambda: doctor))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Contestant]:
    """The engines that would have been measured, which tell invented times."""
    contestants: list[Contestant] = []

    def take_turns(taking_part: list[Contestant], rounds: list[Any], together: bool, note: Any) -> None:
        assert not together
        for contestant in taking_part:
            load = {"versions": {}, "weights": "BF16", "isa": "", "import_seconds": 1.0, "load_seconds": 2.0}
            contestant.loads.append(load)
            contestant.answers = [[answer(request) for request in requests] for requests in rounds]
        contestants.extend(taking_part)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "serve":
            chunks = [[1.0, 1], [2.0, request["new_tokens"] - 1]]
            served = {"client": 0, "started": 0.5, "ended": 2.0, "chunks": chunks}
            return {"began": 0.0, "requests": [served]}
        ids = list(range(request["new_tokens"]))
        return {"time_to_first_token": 0.5, "first_count": 1, "decode_seconds": 3.0, "token_ids": ids}

    for module in (runner, parallel, llama_bench):
        monkeypatch.setattr(module, "take_turns", take_turns)
    return contestants


def engines_of(contestants: list[Contestant]) -> list[tuple[str, str]]:
    return [(contestant.engine, contestant.load_request["device"]) for contestant in contestants]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("device", "name"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_on_a_gpu_tensor_is_compared_with_what_runs_there(
    folder: Path, asked: list[Contestant], device: str, name: str
) -> None:
    result = bench.run_bench(folder, device=device, new_tokens=8, runs=2)
    assert engines_of(asked) == [("tensor", name), ("candle", name), ("transformers", name)]
    assert (result.device, result.together) == (name, False)
    assert dataclasses.asdict(result)["device"] == name
    lines = table(result).splitlines()
    assert lines[1].endswith(f" threads; {name} beside {result.machine['cpu']}")
    assert lines[3:5] == [
        "engines for the CPU only are left out; peak MB is the CPU's memory, not the GPU's",
        "the engines took turns, and loaded in every round",
    ]
    assert lines[-2:] == [
        "tensor against candle: prefill 1x, decode 1x",
        "tensor against transformers: prefill 1x, decode 1x",
    ]


@pytest.mark.usefixtures("gpus")
def test_clients_can_use_a_gpu(folder: Path, asked: list[Contestant]) -> None:
    result = bench.run_parallel(folder, clients=1, requests=1, device="cuda", new_tokens=8)
    assert engines_of(asked) == [("tensor", "cuda:0"), ("candle", "cuda:0"), ("transformers", "cuda:0")]
    assert result.device == "cuda:0"
    text = parallel_table(result)
    assert "; cuda:0 beside " in text
    assert "engines for the CPU only are left out" in text
    assert "tensor relative to candle: output 1x" in text
    assert ENGINES["transformers"].one_at_a_time


@pytest.mark.usefixtures("gpus")
def test_llama_bench_shows_a_gpu(folder: Path, asked: list[Contestant]) -> None:
    result = bench.run_llama_bench(folder, device="cuda", against=["candle"], new_tokens=8)
    assert engines_of(asked) == [("tensor", "cuda:0"), ("candle", "cuda:0")]
    names, _, *rows = FORMATS["md"](result).splitlines()
    assert [cell.strip() for cell in names.split("|")[5:8]] == ["threads", "dev", "test"]
    assert [row.split("|")[6].strip() for row in rows] == ["cuda:0"] * 4
    for line in FORMATS["jsonl"](result).splitlines():
        assert json.loads(line)["devices"] == "cuda:0"


def test_on_the_cpu_nothing_is_left_out(folder: Path) -> None:
    result = bench.run_bench(folder, device="cpu", against=["tensor"], prompt_tokens=8, new_tokens=2, runs=1)
    assert [(engine.engine, engine.failed) for engine in result.engines] == [("cpu", None), ("tensor", None)]
    assert result.device == "cpu"
    text = table(result)
    assert f"; {result.machine['cpu']}, {result.machine['isa']}" in text
    assert "left out" not in text


@pytest.mark.parametrize("device", ["cuda:99", "metal:9", "gpu", "auto", ""])
@pytest.mark.parametrize(
    "run", [bench.run_bench, bench.run_llama_bench, lambda *a, **k: bench.run_parallel(*a, clients=2, **k)]
)
def test_a_device_that_cannot_be_used_is_an_error_before_anything_runs(
    tmp_path: Path, asked: list[Contestant], run: Run, device: str
) -> None:
    # Not even the checkpoint is read: there is none.
    with pytest.raises(DeviceError, match=r"not one that this build can use here: cpu") as caught:
        run(tmp_path / "none", device=device)
    assert caught.value.device == device
    assert asked == []


def test_the_command_finds_out_before_it_writes_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "write_synthetic", None)
    assert cli.main(["bench", "--synthetic", "8b", "--device", "cuda:99"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "'cuda:99' is not one that this build can use here: cpu" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--roofline"], "argument --roofline: measures the CPU, not --device cuda"),
        (["--against", "numpy"], "'numpy' is none of candle, transformers with --device cuda"),
        (["--against", "candle,llama-cpp-python", "--parallel", "2"], "'llama-cpp-python' is none of candle"),
        (["--against", "cpu", "--format", "md"], "'cpu' is none of candle, transformers"),
    ],
)
def test_what_measures_the_cpu_only_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "model", "--device", "cuda", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("gpus")
def test_what_measures_the_cpu_only_is_a_value_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="roofline measures the CPU, not cuda:0"):
        bench.run_bench(folder, device="cuda", roofline=True)
    with pytest.raises(
        ValueError, match="unknown engine 'numpy': choose from candle, transformers on device"
    ):
        bench.run_bench(folder, device="cuda", against=["numpy"])


def task(path: Path, device: str) -> worker.Task:
    return worker.Task(path, device, threads=1, clients=1, context_length=64)


@pytest.mark.parametrize("engine", ["tensor", "candle"])
def test_our_engines_load_on_the_device(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    loaded: list[dict[str, Any]] = []

    def load(path: Path, **options: Any) -> Any:
        loaded.append(options)
        storage = {"BF16": SimpleNamespace(bytes=2), "F32": SimpleNamespace(bytes=1)}
        return SimpleNamespace(load_report=SimpleNamespace(storage=storage, isa="none"))

    monkeypatch.setitem(sys.modules, "candle_llama", SimpleNamespace(load=load))  # type: ignore[arg-type]
    adapter = worker.ADAPTERS[engine]()
    assert adapter.load(task(Path("model"), "cuda:1")) == {"weights": "BF16", "isa": "none"}
    assert [(options["device"], options["engine"]) for options in loaded] == [("cuda:1", engine)]


class FakeTorch:
    """torch and transformers, as far as the benchmark uses them; records what it is asked."""

    float32, bfloat16 = "torch.float32", "torch.bfloat16"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.cuda = SimpleNamespace(
            get_device_name=lambda device: f"GPU {device.index}",
            synchronize=lambda device: self.calls.append(("synchronize", device.type, device.index)),
        )
        self.mps = SimpleNamespace(synchronize=lambda: self.calls.append(("synchronize", "mps", None)))
        self.backends = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "AVX2"))
        self.AutoModelForCausalLM = self
        self.GenerationConfig = dict

    def set_num_threads(self, threads: int) -> None:
        assert threads == 1

    def device(self, name: str) -> SimpleNamespace:
        kind, _, index = name.partition(":")
        return SimpleNamespace(type=kind, index=int(index) if index else None)

    def from_pretrained(self, **options: Any) -> "FakeTorch":
        self.dtype = options["dtype"]
        return self

    def to(self, device: SimpleNamespace) -> "FakeTorch":
        self.calls.append(("to", device.type, device.index))
        return self

    def eval(self) -> "FakeTorch":
        return self

    def inference_mode(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def tensor(self, ids: list[list[int]], device: SimpleNamespace) -> list[list[int]]:
        self.calls.append(("tensor", device.type, device.index))
        return ids

    def ones_like(self, ids: list[list[int]]) -> list[list[int]]:
        return [[1] * len(row) for row in ids]

    def generate(self, ids: Any, *, max_new_tokens: int, streamer: Any, attention_mask: Any) -> None:
        self.calls.append(("generate",))
        for _ in range(1 + max_new_tokens):
            streamer.put(SimpleNamespace(flatten=lambda: SimpleNamespace(tolist=lambda: [7])))
        streamer.end()


@pytest.mark.parametrize(
    ("device", "on", "isa", "gguf_dtype"),
    [
        ("cuda:1", ("cuda", 1), "GPU 1", "bfloat16"),
        ("metal", ("mps", None), "mps", "bfloat16"),
        ("cpu", ("cpu", None), "AVX2", "float32"),
    ],
)
def test_torch_runs_on_the_device_and_is_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    on: tuple[str, int | None],
    isa: str,
    gguf_dtype: str,
) -> None:
    torch = FakeTorch()
    for name in ("torch", "transformers", "transformers.models.llama.modeling_llama"):
        monkeypatch.setitem(sys.modules, name, torch)  # type: ignore[arg-type]
    adapter = worker.ADAPTERS["transformers"]()
    assert adapter.load(task(tmp_path, device)) == {"weights": "auto", "isa": isa}
    assert adapter.load(task(tmp_path / "model.gguf", device)) == {"weights": gguf_dtype, "isa": isa}
    waited = [("synchronize", *on)] if device != "cpu" else []
    assert torch.calls == [("to", *on), *waited] * 2
    torch.calls.clear()
    arrivals = worker.Arrivals()
    adapter.run([1, 2, 3], 4, arrivals)
    assert arrivals.token_ids == [7, 7, 7, 7]
    assert torch.calls == [("tensor", *on), ("generate",), *waited]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_real_transformers_reads_the_same_prompts(folder: Path, tmp_path: Path, kind: str) -> None:
    path = folder
    if kind == "gguf":
        path = tiny.write_gguf(tmp_path / "model.gguf", tiny.gguf_config(), matrix_type="Q8_0")
    options: dict[str, Any] = {"prompt_tokens": 24, "new_tokens": 6, "runs": 1, "threads": 1}
    engine = bench.run_bench(path, against=["transformers"], **options).engine("transformers")
    if engine.skipped:
        pytest.skip(engine.skipped)
    assert engine.failed is None
    assert engine.weights == "float32"
    assert len(engine.runs) == 1
