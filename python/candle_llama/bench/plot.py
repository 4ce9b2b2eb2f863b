"""Draws the results of a benchmark as a chart, with matplotlib.

matplotlib is imported only when a chart is drawn. It is an optional dependency, the extra `plot`.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from candle_llama.bench.parallel import ParallelResult, Percentiles
from candle_llama.bench.report import where
from candle_llama.bench.result import BenchResult, Spread

__all__ = ["SUFFIXES", "plot", "require_matplotlib"]

SUFFIXES = (".png", ".svg")

# The default engine stands out; the median is the darkest of the percentiles.
_OURS, _OTHER = "#0072b2", "#8c8c8c"
_SHADES = {"median": 1.0, "p90": 0.6, "p99": 0.3}


def require_matplotlib() -> None:
    """Checks that a chart can be drawn.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("a chart needs matplotlib: pip install 'candle-llama[plot]'")


def plot(result: BenchResult | ParallelResult, path: Path) -> None:
    """Writes a chart; the file is complete or does not change.

    Args:
        result: Speeds by engine, or the speed and the waiting times with several clients.
        path: A file whose name ends in one of `SUFFIXES`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If no engine has a result.
        OSError: If the file cannot be written.
    """
    require_matplotlib()
    figure = _with_clients(result) if isinstance(result, ParallelResult) else _one_by_one(result)
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        figure.savefig(unfinished, format=path.suffix.lower()[1:], dpi=150)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _one_by_one(result: BenchResult) -> Any:
    ran = [engine for engine in result.engines if engine.runs]
    colors = [_color(engine is result.engines[0]) for engine in ran]
    figure, panels = _panels(
        result,
        [engine.engine for engine in ran],
        f"{result.prompt_tokens} prompt tokens, {result.new_tokens} new, {result.threads} threads; "
        f"medians of {result.rounds} runs, lines from the slowest to the fastest",
        count=2,
    )
    _speeds(panels[0], "prefill, tok/s", [engine.prefill_tokens_per_second for engine in ran], colors)
    _speeds(panels[1], "decode, tok/s", [engine.decode_tokens_per_second for engine in ran], colors)
    return figure


def _with_clients(result: ParallelResult) -> Any:
    ran = [engine for engine in result.engines if engine.requests]
    colors = [_color(engine is result.engines[0]) for engine in ran]
    figure, panels = _panels(
        result,
        [
            f"{engine.engine}\n(one request at a time)" if engine.one_at_a_time else engine.engine
            for engine in ran
        ],
        f"{result.clients} clients, {result.requests_per_client} requests each of {result.prompt_tokens} "
        f"prompt tokens, {result.new_tokens} new; {result.threads} threads",
        count=3,
    )
    output = [engine.output_tokens_per_second or 0.0 for engine in ran]
    _speeds(panels[0], "output, tok/s", [Spread(speed, speed, speed) for speed in output], colors)
    _waiting_times(panels[1], "first token after, s", [engine.time_to_first_token for engine in ran], colors)
    _waiting_times(panels[2], "gap between tokens, s", [engine.token_gap for engine in ran], colors)
    panels[2].legend(
        handles=panels[2].containers[:3],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
        handlelength=1.0,
    )
    return figure


def _panels(
    result: BenchResult | ParallelResult, engines: Sequence[str], settings: str, count: int
) -> tuple[Any, Any]:
    """Returns a figure with panels side by side, which share a row for each engine, the first on top."""
    if not engines:
        raise ValueError("no engine has a result that a chart could show")
    # Figure, not pyplot: a chart needs no window, and no setting of the user's.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    size = (4.2 * count + 0.8, 1.9 + 0.7 * len(engines))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.06))
    panels = figure.subplots(1, count, sharey=True)
    machine = result.machine
    title = f"{result.model} on {where(result)}"
    # A dollar sign in a name starts no formula.
    figure.suptitle(title, fontweight="bold", parse_math=False)
    figure.supxlabel(f"{settings}; candle-llama {machine['version']}", fontsize="small")
    panels[0].set_yticks(range(len(engines)), engines)
    panels[0].invert_yaxis()
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    return figure, panels


def _color(ours: bool) -> str:
    return _OURS if ours else _OTHER


def _speeds(panel: Any, name: str, spreads: Sequence[Spread | None], colors: Sequence[str]) -> None:
    """Draws a bar for each engine, with a line from the slowest to the fastest run."""
    medians = [spread.median if spread else 0.0 for spread in spreads]
    below = [spread.median - spread.min if spread else 0.0 for spread in spreads]
    above = [spread.max - spread.median if spread else 0.0 for spread in spreads]
    ranges = [below, above] if any(below) or any(above) else None
    bars = panel.barh(range(len(medians)), medians, 0.6, color=colors, xerr=ranges, ecolor="#333333")
    panel.bar_label(bars, [_number(median) if median else "" for median in medians], padding=4)
    panel.set_xlabel(name)
    panel.margins(x=0.18)


def _waiting_times(panel: Any, name: str, times: Sequence[Percentiles | None], colors: Sequence[str]) -> None:
    """Draws three bars for each engine: the median and two percentiles."""
    height = 0.26
    for index, (share, alpha) in enumerate(_SHADES.items()):
        values = [getattr(one, share) if one else 0.0 for one in times]
        rows = [row + (index - 1) * height for row in range(len(values))]
        bars = panel.barh(rows, values, height, color=colors, alpha=alpha, label=share)
        panel.bar_label(bars, [_number(value) if value else "" for value in values], padding=3, fontsize=8)
    panel.set_xlabel(name)
    panel.margins(x=0.18)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
