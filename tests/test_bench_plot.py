"""`bench --plot`: charts, with matplotlib where it is installed."""

import importlib.util
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from candle_llama import cli
from candle_llama.bench import plot
from candle_llama.bench.parallel import ParallelEngineResult, ParallelResult, Percentiles, Request
from candle_llama.bench.result import BenchResult, EngineResult, Run, Spread

MACHINE = {"cpu": "Some $CPU$", "isa": "avx2", "version": "1.2.3", "python": "3.11.7", "platform": "Linux"}

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)


def one_by_one() -> BenchResult:
    def engine(name: str, prefill: float, decode: float | None) -> EngineResult:
        return EngineResult(
            name,
            runs=(Run(1.0, prefill, 1.0, decode, 64),),
            prefill_tokens_per_second=Spread(prefill, prefill * 0.9, prefill * 1.1),
            decode_tokens_per_second=Spread(decode, decode, decode) if decode else None,
        )

    engines = (engine("cpu", 600.0, 90.0), EngineResult("candle", skipped="no"), engine("numpy", 200.0, None))
    return BenchResult("a_$b$", 135_000_000, 270_000_000, 512, 64, 1, "cpu", 2, 0, True, MACHINE, engines)


def with_clients() -> ParallelResult:
    def engine(name: str, gap: Percentiles | None) -> ParallelEngineResult:
        return ParallelEngineResult(
            name,
            one_at_a_time=name != "cpu",
            requests=(Request(0, 0.0, 1.0, 0.5),),
            output_tokens_per_second=64.0,
            time_to_first_token=Percentiles(0.5, 0.6, 0.7),
            token_gap=gap,
        )

    engines = (engine("cpu", Percentiles(0.01, 0.02, 0.3)), engine("llama-cpp-python", None))
    return ParallelResult("model", 135_000_000, 270_000_000, 2, 4, 512, 64, "cpu", 2, 0, MACHINE, engines)


@needs_matplotlib
@pytest.mark.parametrize("result", [one_by_one, with_clients])
@pytest.mark.parametrize("suffix", [".png", ".svg", ".PNG"])
def test_charts_are_written_in_both_formats(
    tmp_path: Path, result: Callable[[], BenchResult | ParallelResult], suffix: str
) -> None:
    path = tmp_path / f"chart{suffix}"
    path.write_text("an older file")
    plot.plot(result(), path)
    if suffix == ".svg":
        assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
    else:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@needs_matplotlib
def test_a_chart_that_cannot_be_drawn_leaves_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def savefig(self: Figure, path: Path, **_: object) -> None:
        path.write_text("half of")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", savefig)
    path = tmp_path / "chart.png"
    path.write_text("an older file")
    with pytest.raises(OSError, match="no space left"):
        plot.plot(one_by_one(), path)
    assert path.read_text() == "an older file"
    assert [file.name for file in tmp_path.iterdir()] == ["chart.png"]


@needs_matplotlib
def test_a_chart_needs_a_result(tmp_path: Path) -> None:
    empty = BenchResult(
        "model", 1, 1, 1, 1, 1, "cpu", 1, 0, True, MACHINE, (EngineResult("cpu", failed="boom"),)
    )
    with pytest.raises(ValueError, match="no engine has a result"):
        plot.plot(empty, tmp_path / "chart.png")


@needs_matplotlib
@pytest.mark.parametrize("mode", [("--runs", "1"), ("--parallel", "2", "--requests", "1")])
def test_command_draws_a_chart_beside_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: tuple[str, ...]
) -> None:
    model = tiny.write_gguf(tmp_path / "tiny.gguf", matrix_type="Q8_0")
    words = ("--prompt-tokens", "16", "--new-tokens", "4", "--against", "none", *mode)
    assert cli.main(["bench", str(model), *words, "--plot", str(tmp_path / "chart.svg")]) == 0
    assert capsys.readouterr().out.startswith("tiny.gguf: ")
    assert "cpu" in (tmp_path / "chart.svg").read_text(encoding="utf-8")


def test_without_matplotlib_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", str(tmp_path / "absent"), "--plot", str(tmp_path / "chart.png")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "candle-llama: error: a chart needs matplotlib: pip install 'candle-llama[plot]'\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "chart.gif"], "must end in .png or .svg, not 'chart.gif'"),
        (["--plot", "png"], "must end in .png or .svg, not 'png'"),
        (["--plot", "no/such/folder/chart.png"], "there is no folder"),
        (["--json", "no/such/folder/result.json"], "there is no folder"),
        (["--json", "."], "'.' is a folder"),
        (["--plot", "chart.png", "--format", "md"], "argument --format: not allowed with argument --plot"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "absent", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
