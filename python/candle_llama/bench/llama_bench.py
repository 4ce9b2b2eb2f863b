"""The tests of llama.cpp's tool llama-bench, and its tables, so that rows of both can stand side by side.

`pp512` processes a prompt of 512 tokens, `tg128` generates 128 tokens, and `@ d4096` says that a context of
4096 tokens precedes them. Columns, units and names of fields are llama-bench's.
"""

import csv
import datetime
import io
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from candle_llama.bench.contest import Contestant, take_turns
from candle_llama.bench.setting import WARM_UP_TOKENS, Setting, check_positive
from candle_llama.bench.subject import Subject

__all__ = ["FORMATS", "LlamaBenchResult", "Speed", "run_llama_bench"]


@dataclass(frozen=True)
class Speed:
    """One engine's speed in one test: a prompt (`pp`) or new tokens (`tg`), never both."""

    engine: str
    prompt_tokens: int
    """0 in a `tg` test."""
    new_tokens: int
    """0 in a `pp` test."""
    depth: int
    """Tokens of context before those that are measured."""
    seconds: tuple[float, ...]
    """The time of these tokens, round by round."""

    @property
    def name(self) -> str:
        """llama-bench's name of the test."""
        name = f"pp{self.prompt_tokens}" if self.prompt_tokens else f"tg{self.new_tokens}"
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def tokens_per_second(self) -> tuple[float, ...]:
        """The speed, round by round."""
        tokens = self.prompt_tokens + self.new_tokens
        return tuple(tokens / seconds for seconds in self.seconds)


@dataclass(frozen=True)
class LlamaBenchResult:
    """The speeds of all engines that ran, and why the others did not."""

    path: str
    model: str
    """Name and storage type."""
    parameters: int
    checkpoint_bytes: int
    device: str
    """Where the engines ran."""
    threads: int
    cpu: str
    version: str
    """This package's version."""
    time: str
    """When the measurement began: ISO 8601, UTC."""
    speeds: tuple[Speed, ...]
    skipped: dict[str, str]
    failed: dict[str, str]


def run_llama_bench(
    path: str | os.PathLike[str],
    *,
    against: Sequence[str] = (),
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    depth: int = 0,
    runs: int = 3,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    note: Callable[[str], None] | None = None,
) -> LlamaBenchResult:
    """Measures a prompt and new tokens separately, through the engines' public interfaces.

    New tokens are timed from the first one, which follows a prompt of `depth` tokens, or of one token. The
    time of a prompt at a depth is the difference of two times to the first token: with and without the
    prompt after `depth` tokens. The two contexts have other tokens, so that no prefix cache helps.

    Args:
        path: A folder or a .gguf file.
        against: Names of `engines.opponents`.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens to generate.
        depth: Tokens of context before them.
        runs: Number of rounds.
        device: Where every engine runs: "cpu", "cuda", "cuda:1", "metal".
        threads: Threads of every engine; None uses the performance cores that this process may use.
        seed: Seed of the prompts.
        note: Called with a line about every step.

    Raises:
        DeviceError: If the device cannot be used here.
        FileNotFoundError: If a file of the checkpoint is missing.
        ValueError: If a number is not positive (`depth`: negative), an engine unknown, or the context too
            short.
    """
    check_positive(prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs)
    if depth < 0:
        raise ValueError(f"depth must not be negative, not {depth}")
    # One more token is generated, at which the clock starts.
    of_prompt, of_new_tokens = (depth + prompt_tokens, 1), (max(depth, 1), new_tokens + 1)
    longest = max(of_prompt, of_new_tokens, key=sum)
    setting = Setting.open(
        path,
        against=against,
        device=device,
        prompt_tokens=longest[0],
        new_tokens=longest[1],
        threads=threads,
    )
    subject = setting.subject

    def request(length: int, new_tokens: int, turn: int) -> dict[str, Any]:
        return {"do": "run", "prompt": subject.prompt(length, (seed, turn)), "new_tokens": new_tokens}

    warm_up_tokens = min(new_tokens, WARM_UP_TOKENS, sum(longest) - prompt_tokens)
    contestants = setting.contestants(warm_up=request(prompt_tokens, warm_up_tokens, 2 * runs))
    rounds = [[request(*of_prompt, 2 * turn), request(*of_new_tokens, 2 * turn + 1)] for turn in range(runs)]
    subject.warm_page_cache()
    time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    take_turns(contestants, rounds, setting.fits(contestants), note)
    speeds: list[Speed] = []
    failed = {}
    for contestant in contestants:
        try:
            speeds += _speeds(contestant, prompt_tokens, new_tokens, depth)
        except ValueError as error:
            failed[contestant.engine] = str(error)
    return LlamaBenchResult(
        path=str(path),
        model=_model(subject),
        parameters=subject.parameters,
        checkpoint_bytes=subject.checkpoint_bytes,
        device=setting.device,
        threads=setting.threads,
        cpu=setting.machine["cpu"],
        version=setting.machine["version"],
        time=time,
        speeds=tuple(speeds),
        skipped=dict(setting.skipped),
        failed=failed,
    )


def _speeds(contestant: Contestant, prompt_tokens: int, new_tokens: int, depth: int) -> list[Speed]:
    """Returns the engine's speeds in both tests.

    Raises:
        ValueError: If the engine failed, or its times have no meaning.
    """
    if contestant.failed:
        raise ValueError(contestant.failed)
    prompt_seconds, new_seconds = [], []
    for prompt, generation in contestant.answers:
        without_prompt = generation["time_to_first_token"] if depth else 0.0
        seconds = prompt["time_to_first_token"] - without_prompt
        if seconds <= 0:
            raise ValueError(
                f"{depth + prompt_tokens} prompt tokens took no longer than {depth}; is the machine busy?"
            )
        prompt_seconds.append(seconds)
        timed = new_tokens + 1 - generation["first_count"]
        if not timed or not generation["decode_seconds"]:
            raise ValueError("all tokens arrived at once")
        new_seconds.append(generation["decode_seconds"] / timed * new_tokens)
    return [
        Speed(contestant.engine, prompt_tokens, 0, depth, tuple(prompt_seconds)),
        Speed(contestant.engine, 0, new_tokens, depth, tuple(new_seconds)),
    ]


def _model(subject: Subject) -> str:
    name = subject.path.name.removesuffix(".gguf")
    return name if subject.storage_type in name else f"{name} {subject.storage_type}"


def markdown(result: LlamaBenchResult) -> str:
    """Formats a table in Markdown."""
    # llama-bench shows a setting only if it is not the default.
    on_gpu = result.device != "cpu"
    rows = [
        (
            # A bar would end the cell.
            " ".join(result.model.split()).replace("|", "\\|"),
            _size(result.checkpoint_bytes),
            _parameters(result.parameters),
            speed.engine,
            str(result.threads),
            *([result.device] if on_gpu else []),
            speed.name,
            f"{statistics.mean(speed.tokens_per_second):.2f} ± {_deviation(speed.tokens_per_second):.2f}",
        )
        for speed in result.speeds
    ]
    names = ("model", "size", "params", "backend", "threads", *(["dev"] if on_gpu else []), "test", "t/s")
    to_the_left = {"model", "backend", "dev"}
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    rule = [
        "-" * width if name in to_the_left else "-" * (width - 1) + ":"
        for name, width in zip(names, widths, strict=True)
    ]
    lines = []
    for row in (names, rule, *rows):
        cells = [
            cell.ljust(width) if name in to_the_left else cell.rjust(width)
            for name, cell, width in zip(names, row, widths, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comma_separated(result: LlamaBenchResult) -> str:
    """Formats a table as CSV: a line of names, then a line per test, all fields in quotes."""
    records = [_record(result, speed) for speed in result.speeds]
    names = [name for name in records[0] if not name.startswith("samples")] if records else []
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().rstrip("\n")


def json_lines(result: LlamaBenchResult) -> str:
    """Formats a JSON object per line, one for each test."""
    return "\n".join(json.dumps(_record(result, speed)) for speed in result.speeds)


FORMATS: dict[str, Callable[[LlamaBenchResult], str]] = {
    "md": markdown,
    "csv": comma_separated,
    "jsonl": json_lines,
}
"""llama-bench's forms of a table, by its names."""


def _record(result: LlamaBenchResult, speed: Speed) -> dict[str, Any]:
    nanoseconds = [round(seconds * 1e9) for seconds in speed.seconds]
    return {
        "candle_llama_version": result.version,
        "cpu_info": result.cpu,
        "backends": speed.engine,
        "devices": result.device,
        "model_filename": result.path,
        "model_type": result.model,
        "model_size": result.checkpoint_bytes,
        "model_n_params": result.parameters,
        "n_threads": result.threads,
        "n_prompt": speed.prompt_tokens,
        "n_gen": speed.new_tokens,
        "n_depth": speed.depth,
        "test_time": result.time,
        "avg_ns": round(statistics.mean(nanoseconds)),
        "stddev_ns": round(_deviation(nanoseconds)),
        "avg_ts": statistics.mean(speed.tokens_per_second),
        "stddev_ts": _deviation(speed.tokens_per_second),
        "samples_ns": nanoseconds,
        "samples_ts": list(speed.tokens_per_second),
    }


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
