"""`bench --format`: llama-bench's tests, and its tables."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from candle_llama import cli
from candle_llama.bench import llama_bench
from candle_llama.bench.contest import Contestant
from candle_llama.bench.llama_bench import FORMATS, LlamaBenchResult, Speed, run_llama_bench


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf", matrix_type="Q8_0")


def answer(first: float, decode: float = 0.0, first_count: int = 1) -> dict[str, Any]:
    return {"time_to_first_token": first, "decode_seconds": decode, "first_count": first_count}


def speeds_of(rounds: list[list[dict[str, Any]]], depth: int = 0) -> list[Speed]:
    return llama_bench._speeds(Contestant("cpu", {}, {}, answers=rounds), 100, 20, depth)


def test_a_prompt_is_timed_to_its_first_token_and_new_tokens_from_there() -> None:
    prompt, generation = speeds_of([[answer(0.5), answer(9.0, decode=4.0)], [answer(2.0), answer(9.0, 5.0)]])
    assert (prompt.name, prompt.tokens_per_second) == ("pp100", (200.0, 50.0))
    assert (generation.name, generation.tokens_per_second) == ("tg20", (5.0, 4.0))


def test_the_context_before_a_prompt_does_not_count() -> None:
    prompt, generation = speeds_of([[answer(3.0), answer(2.5, decode=4.0)]], depth=4096)
    assert (prompt.name, prompt.tokens_per_second) == ("pp100 @ d4096", (200.0,))
    assert (generation.name, generation.tokens_per_second) == ("tg20 @ d4096", (5.0,))


def test_tokens_that_arrive_with_the_first_one_are_not_timed() -> None:
    _, generation = speeds_of([[answer(1.0), answer(1.0, decode=4.0, first_count=5)]])
    assert generation.tokens_per_second == (4.0,)


@pytest.mark.parametrize(
    ("round_", "depth", "message"),
    [
        ([answer(1.0), answer(1.0, first_count=21)], 0, "all tokens arrived at once"),
        ([answer(1.0), answer(1.0, 1.0)], 8, "108 prompt tokens took no longer than 8"),
    ],
)
def test_times_without_meaning_are_errors(round_: list[dict[str, Any]], depth: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speeds_of([round_], depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "new_tokens must be at least 1, not 0"),
        ({"depth": -1}, "depth must not be negative, not -1"),
        ({"depth": 1000}, "1512 prompt and 1 new tokens exceed the model's context of 1024"),
        ({"against": ["xllamacpp"]}, "unknown engine 'xllamacpp'"),
    ],
)
def test_bad_arguments_are_value_errors(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_llama_bench(model, **options)


def test_each_test_of_its_own_must_fit_into_the_context(model: Path) -> None:
    result = run_llama_bench(model, prompt_tokens=16, new_tokens=4, depth=1004, runs=1, threads=1)
    assert (result.failed, len(result.speeds)) == ({}, 2)


RESULT = LlamaBenchResult(
    path="models/a|b.gguf",
    model="a|b Q4_0",
    parameters=1_235_814_400,
    checkpoint_bytes=698_737_056,
    device="cpu",
    threads=2,
    cpu='Some "CPU", 2 cores',
    version="1.2.3",
    time="2026-11-29T00:00:00Z",
    speeds=(
        Speed("cpu", 512, 0, 4096, (1.0, 2.0)),
        Speed("llama-cpp-python", 0, 128, 4096, (4.0,)),
    ),
    skipped={},
    failed={},
)


def test_markdown_has_llama_bench_columns() -> None:
    assert FORMATS["md"](RESULT).splitlines() == [
        "| model     |       size | params | backend          | threads |          test |             t/s |",
        "| --------- | ---------: | -----: | ---------------- | ------: | ------------: | --------------: |",
        "| a\\|b Q4_0 | 666.37 MiB | 1.24 B | cpu              |       2 | pp512 @ d4096 | 384.00 ± 181.02 |",
        "| a\\|b Q4_0 | 666.37 MiB | 1.24 B | llama-cpp-python |       2 | tg128 @ d4096 |    32.00 ± 0.00 |",
    ]
    small = dataclasses.replace(RESULT, checkpoint_bytes=3 << 30, parameters=134_515_008)
    assert "| 3.00 GiB | 134.52 M |" in FORMATS["md"](small)


def test_csv_and_json_lines_hold_the_same_values() -> None:
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](RESULT))))
    objects = [json.loads(line) for line in FORMATS["jsonl"](RESULT).splitlines()]
    assert len(rows) == len(objects) == 2
    for row, one in zip(rows, objects, strict=True):
        assert row == {name: str(value) for name, value in one.items() if not name.startswith("samples")}
    prompt, generation = objects
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_depth"]) == (512, 0, 4096)
    assert (generation["n_prompt"], generation["n_gen"]) == (0, 128)
    assert prompt["cpu_info"] == RESULT.cpu
    assert prompt["samples_ns"] == [1_000_000_000, 2_000_000_000]
    assert (prompt["avg_ns"], prompt["stddev_ns"]) == (1_500_000_000, 707_106_781)
    assert (prompt["avg_ts"], prompt["samples_ts"]) == (384.0, [512.0, 256.0])
    assert generation["stddev_ts"] == 0.0


def run_command(*words: str) -> int:
    return cli.main(["bench", *words])


def test_stdout_holds_nothing_but_the_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--prompt-tokens", "24", "--new-tokens", "4", "--runs", "2", "--threads", "1")
    assert run_command(str(model), *words, "--format", "md", "--against", "numpy") == 0
    captured = capsys.readouterr()
    names, _, *rows = [re.split(r" *\| *", line)[1:-1] for line in captured.out.splitlines()]
    assert names == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert [row[3:6] for row in rows] == [
        ["cpu", "1", "pp24"],
        ["cpu", "1", "tg4"],
        ["numpy", "1", "pp24"],
        ["numpy", "1", "tg4"],
    ]
    assert {row[0] for row in rows} == {"tiny Q8_0"}
    assert captured.err == ""


def test_prompts_differ_and_hold_the_context(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[dict[str, Any]]] = []

    def take_turns(contestants: list[Contestant], rounds: list[list[dict[str, Any]]], *_: Any) -> None:
        asked.extend(rounds)
        contestants[0].answers = [[answer(3.0), answer(1.0, decode=4.0)] for _ in rounds]

    monkeypatch.setattr(llama_bench, "take_turns", take_turns)
    words = ("--prompt-tokens", "100", "--new-tokens", "20", "--depth", "50", "--runs", "2")
    assert run_command(str(model), *words, "--format", "jsonl") == 0
    tests = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(test["n_prompt"], test["n_gen"], test["n_depth"]) for test in tests] == [
        (100, 0, 50),
        (0, 20, 50),
    ]
    assert [test["avg_ts"] for test in tests] == [50.0, 5.0]
    requests = [request for round_ in asked for request in round_]
    assert [(len(request["prompt"]), request["new_tokens"]) for request in requests] == [
        (150, 1),
        (50, 21),
    ] * 2
    assert len({tuple(request["prompt"][:8]) for request in requests}) == 4


def test_engines_that_did_not_run_are_named_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.write_checkpoint(tmp_path / "tiny")
    words = ("--prompt-tokens", "8", "--new-tokens", "2", "--runs", "1", "--format", "csv")
    assert run_command(str(folder), *words, "--against", "llama-cpp-python") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err == ("llama-cpp-python was skipped: reads GGUF files only, and tiny is a folder\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "yaml"], "invalid choice: 'yaml' (choose from "),
        (["--format", "md", "--json", "-"], "argument --json: not allowed with argument --format"),
        (["--format", "md", "--roofline"], "argument --format: not allowed with argument --roofline"),
        (["--depth", "16"], "--depth needs --format"),
        (["--depth", "-1"], "must be a whole number, at least 0, not '-1'"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command("model", *words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
