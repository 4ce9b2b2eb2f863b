"""Formats benchmarks as plain-text tables."""

import textwrap
from collections.abc import Sequence

from candle_llama.bench.parallel import ParallelEngineResult, ParallelResult, Percentiles
from candle_llama.bench.result import BenchResult, EngineResult, Spread
from candle_llama.bench.roofline import Roofline

# Two lines for each column, so that a table fits 100 columns.
HEADINGS = (
    ("", "engine"),
    ("", "weights"),
    ("load", "s"),
    ("first token", "ms"),
    ("prefill", "tok/s"),
    ("of", "peak"),
    ("decode", "tok/s"),
    ("of", "bandwidth"),
    ("peak", "MB"),
    ("same", "tokens"),
)
PARALLEL_HEADINGS = (
    ("", "engine"),
    ("", "weights"),
    ("requests", "/s"),
    ("output", "tok/s"),
    ("first token", "median s"),
    ("", "p90"),
    ("", "p99"),
    ("token gap", "median s"),
    ("", "p90"),
    ("", "p99"),
    ("peak", "MB"),
)
# Columns that are shown only if the machine's peaks were measured.
OF_PEAKS = (5, 7)
_WIDTH = 100


def table(result: BenchResult) -> str:
    """Formats the results: the setup, a row per engine, and how the default engine compares with the others.

    Speeds are medians; the slowest and the fastest run are beneath them, if they differ.
    """
    lines = _head(
        result,
        f"{_count(result.prompt_tokens, 'prompt token')}, {result.new_tokens} new, "
        f"{_count(result.rounds, 'run')}, {_count(result.threads, 'thread')}",
    )
    if not result.together:
        on_cpu = result.device == "cpu"
        who = "memory is too small for all engines together: they" if on_cpu else "the engines"
        lines.append(f"{who} took turns, and loaded in every round")
    if result.roofline:
        lines += _peaks(result.roofline)
    lines = [part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="  ")]
    lines.append("")
    ran = [engine for engine in result.engines if engine.runs]
    if ran:
        rows = [*zip(*HEADINGS, strict=True)]
        for engine in ran:
            rows += _rows(engine, result.new_tokens)
        if not (result.roofline and result.roofline.best):
            rows = [tuple(cell for i, cell in enumerate(row) if i not in OF_PEAKS) for row in rows]
        lines += _aligned(rows)
    lines += _without_result(result.engines)
    if result.roofline:
        lines += [f"warning: {warning}" for warning in result.roofline.warnings]
    if len(ran) > 1 and ran[0] is result.engines[0]:
        lines.append("")
        lines += [_comparison(ran[0], other) for other in ran[1:]]
    return "\n".join(lines)


def parallel_table(result: ParallelResult) -> str:
    """Formats the results with clients: the setup, a row per engine, and how the default engine compares.

    All times are in seconds.
    """
    lines = _head(
        result,
        f"{_count(result.clients, 'client')}, each {_count(result.requests_per_client, 'request')} one after "
        f"the other; {_count(result.prompt_tokens, 'prompt token')}, {result.new_tokens} new, "
        f"{_count(result.threads, 'thread')}",
    )
    lines.append("every request has another prompt, so that prefix caches do not help")
    lines = [part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="  ")]
    lines.append("")
    ran = [engine for engine in result.engines if engine.requests]
    if ran:
        lines += _aligned([*zip(*PARALLEL_HEADINGS, strict=True), *map(_parallel_row, ran)])
    lines += [
        f"{engine.engine} serves one request at a time: its clients wait for each other"
        for engine in ran
        if engine.one_at_a_time and result.clients > 1
    ]
    lines += _without_result(result.engines)
    if len(ran) > 1 and ran[0] is result.engines[0]:
        lines.append("")
        lines += [_parallel_comparison(ran[0], other) for other in ran[1:]]
    return "\n".join(lines)


def where(result: BenchResult | ParallelResult) -> str:
    """Names the device: the CPU's name and its ISA, or the GPU beside the CPU."""
    cpu = result.machine["cpu"]
    return f"{cpu}, {result.machine['isa']}" if result.device == "cpu" else f"{result.device} beside {cpu}"


def _head(result: BenchResult | ParallelResult, settings: str) -> list[str]:
    machine = result.machine
    lines = [
        f"{result.model}: {_number(result.parameters / 1e6)} M parameters, "
        f"{_number(result.checkpoint_bytes / 1e6)} MB",
        f"{settings}; {where(result)}",
        f"candle-llama {machine['version']}, Python {machine['python']}, {machine['platform']}",
    ]
    if result.device != "cpu":
        lines.append("engines for the CPU only are left out; peak MB is the CPU's memory, not the GPU's")
    return lines


def _without_result(engines: Sequence[EngineResult] | Sequence[ParallelEngineResult]) -> list[str]:
    lines = []
    for engine in engines:
        if engine.skipped:
            lines.append(f"{engine.engine} was skipped: {engine.skipped}")
        elif engine.failed:
            lines.append(f"{engine.engine} failed: {engine.failed}")
    return lines


def _parallel_row(engine: ParallelEngineResult) -> tuple[str, ...]:
    def numbers(percentiles: Percentiles | None) -> tuple[str, str, str]:
        if percentiles is None:
            return "", "", ""
        return _number(percentiles.median), _number(percentiles.p90), _number(percentiles.p99)

    return (
        engine.engine,
        engine.weights or "",
        _number(engine.requests_per_second or 0.0),
        _number(engine.output_tokens_per_second or 0.0),
        *numbers(engine.time_to_first_token),
        *numbers(engine.token_gap),
        f"{engine.peak_memory / 1e6:.0f}" if engine.peak_memory else "",
    )


def _parallel_comparison(ours: ParallelEngineResult, other: ParallelEngineResult) -> str:
    parts = []
    if ours.output_tokens_per_second and other.output_tokens_per_second:
        parts.append(f"output {_number(ours.output_tokens_per_second / other.output_tokens_per_second)}x")
    for name, a, b in (
        ("first token", ours.time_to_first_token, other.time_to_first_token),
        ("token gap", ours.token_gap, other.token_gap),
    ):
        if a and b and b.median:
            parts.append(f"{name} {_number(a.median / b.median)}x")
    return f"{ours.engine} relative to {other.engine}: {', '.join(parts)}"


def _rows(engine: EngineResult, new_tokens: int) -> list[tuple[str, ...]]:
    """The medians, and beneath them the slowest and the fastest run, if they differ."""
    first = _spread(engine.time_to_first_token, 1000.0)
    prefill = _spread(engine.prefill_tokens_per_second)
    decode = _spread(engine.decode_tokens_per_second)
    medians = (
        engine.engine,
        engine.weights or "",
        f"{engine.load_seconds.median:.2f}" if engine.load_seconds else "",
        first[0],
        prefill[0],
        _fraction(engine.prefill_of_peak),
        decode[0],
        _fraction(engine.decode_of_bandwidth),
        f"{engine.peak_memory / 1e6:.0f}" if engine.peak_memory else "",
        f"{min(run.same_tokens for run in engine.runs)}/{new_tokens}",
    )
    ranges = ("", "", "", first[1], prefill[1], "", decode[1], "", "", "")
    return [medians, ranges] if any(ranges) else [medians]


def _peaks(roofline: Roofline) -> list[str]:
    if roofline.best is None:
        return [f"the machine's peaks were not measured: {roofline.failed}"]
    best = roofline.best
    peaks = [
        f"{name} {_number(rate / 1e9)}"
        for name, rate in (
            ("int8", best.int8_operations_per_second),
            ("bf16", best.bf16_operations_per_second),
            ("f32", best.f32_operations_per_second),
        )
        if rate is not None
    ]
    reads = [one.read_bytes_per_second / 1e9 for one in roofline.rounds]
    return [
        f"peaks of these threads, {best.isa}: memory {_number(max(reads))} GB/s (rounds: "
        f"{_number(min(reads))}-{_number(max(reads))}), {', '.join(peaks)} Gop/s; "
        f"decoding a token reads {_number(roofline.work.bytes_per_token / 1e6)} MB"
    ]


def _fraction(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.2f}"


def _spread(spread: Spread | None, scale: float = 1.0) -> tuple[str, str]:
    """Returns the median and the range; the range is empty if all runs gave the same number."""
    if spread is None:
        return "", ""
    median, low, high = (_number(value * scale) for value in (spread.median, spread.min, spread.max))
    return median, "" if low == high else f"{low}-{high}"


def _number(value: float) -> str:
    """Formats with three significant digits, and with all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _comparison(ours: EngineResult, other: EngineResult) -> str:
    parts = []
    for name, a, b in (
        ("prefill", ours.prefill_tokens_per_second, other.prefill_tokens_per_second),
        ("decode", ours.decode_tokens_per_second, other.decode_tokens_per_second),
    ):
        if a and b:
            parts.append(f"{name} {_number(a.median / b.median)}x")
    return f"{ours.engine} against {other.engine}: {', '.join(parts)}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pads columns: the first two to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
