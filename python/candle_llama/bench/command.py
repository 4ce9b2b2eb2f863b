"""`candle-llama bench`: its flags and its main function."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from candle_llama import hub
from candle_llama.bench.engines import GPU_OPPONENTS, OPPONENTS, PARALLEL_OPPONENTS, opponents
from candle_llama.bench.llama_bench import FORMATS, run_llama_bench
from candle_llama.bench.parallel import ParallelResult, run_parallel
from candle_llama.bench.plot import SUFFIXES, plot, require_matplotlib
from candle_llama.bench.report import parallel_table, table
from candle_llama.bench.result import BenchResult
from candle_llama.bench.runner import run_bench
from candle_llama.bench.setting import find_device
from candle_llama.bench.shapes import SHAPES
from candle_llama.bench.synthetic import GGUF_TYPES, find_shape, write_synthetic

RUNS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help='a folder, a .gguf file, a hub id such as "org/name", or "demo"',
    )
    source.add_argument(
        "--synthetic",
        metavar="NAME[:TYPE]",
        type=_synthetic,
        help="random weights of a well-known shape, written once and kept: "
        + ", ".join(" or ".join((shape.name, *shape.aliases)) for shape in SHAPES)
        + f"; with a TYPE ({', '.join(GGUF_TYPES)}) a GGUF file, else a folder in bfloat16",
    )
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=_positive, default=512, help="length of a prompt (default: 512)"
    )
    parser.add_argument(
        "--new-tokens",
        metavar="N",
        type=_positive,
        help="tokens to generate (default: 64; with --format 128)",
    )
    parser.add_argument(
        "--against",
        metavar="NAMES",
        type=_names,
        help=f"engines to compare with, separated by commas, or none (default: {','.join(OPPONENTS)}; "
        f"with --parallel {','.join(PARALLEL_OPPONENTS)}; on a GPU {','.join(GPU_OPPONENTS)}; "
        "with --format none)",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        default="cpu",
        help="where every engine runs: cpu, cuda, cuda:1, metal (default: cpu); cpu is measured there, and "
        "tensor on a GPU",
    )
    parser.add_argument(
        "--roofline",
        action="store_true",
        help="also measure, in each round, the peak memory bandwidth and peak arithmetic of those threads, "
        "and show each engine's decode and prefill speed as fractions of them",
    )
    parser.add_argument("--runs", metavar="N", type=_positive, help=f"rounds (default: {RUNS})")
    parser.add_argument(
        "--threads", metavar="N", type=_positive, help="for every engine (default: performance cores)"
    )
    parser.add_argument(
        "--parallel",
        metavar="N",
        type=_positive,
        help="measure N clients at the same time; each sends its next request when its last one has ended",
    )
    parser.add_argument(
        "--requests", metavar="N", type=_positive, help="with --parallel: of each client (default: 4)"
    )
    parser.add_argument(
        "--depth", metavar="N", type=_whole, help="with --format: tokens of context before those measured"
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument(
        "--json", metavar="FILE", type=_result, help='write the result as JSON, to stdout if FILE is "-"'
    )
    forms.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help="measure a prompt (pp512) and new tokens (tg128) separately, as llama-bench does, and print "
        "only its table",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=_chart,
        help=f'also draw a chart ({" or ".join(SUFFIXES)}); needs matplotlib, the extra "plot"',
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", type=Path, help="where downloads or synthetic checkpoints are kept"
    )


def main(args: argparse.Namespace) -> int:
    """Measures, then prints a table or writes JSON.

    Returns:
        0, or 1 if an engine or the measurement of the peaks failed. A skipped engine is no failure.
    """
    _check_usage(args)
    # Otherwise these would be found out after a checkpoint is written, or after the measurement.
    find_device(args.device)
    if args.plot:
        require_matplotlib()
    if args.synthetic:
        path = write_synthetic(args.synthetic, cache_dir=args.cache_dir, note=_note)
    else:
        path = hub.resolve(args.model, cache_dir=args.cache_dir)
    if args.format:
        return _llama_bench(path, args)
    return _parallel(path, args) if args.parallel else _bench(path, args)


def _check_usage(args: argparse.Namespace) -> None:
    """Refuses flags that have no meaning together, and engines that a benchmark does not know."""
    given = {
        "--parallel": args.parallel,
        "--format": args.format,
        "--runs": args.runs,
        "--roofline": args.roofline,
        "--plot": args.plot,
    }
    without = {"--parallel": ("--format", "--runs", "--roofline"), "--format": ("--roofline", "--plot")}
    for flag, others in without.items():
        for other in others:
            if given[flag] and given[other]:
                args.parser.error(f"argument {flag}: not allowed with argument {other}")
    if args.requests and not args.parallel:
        args.parser.error("--requests needs --parallel")
    if args.depth is not None and not args.format:
        args.parser.error("--depth needs --format")
    if args.roofline and args.device != "cpu":
        args.parser.error(f"argument --roofline: measures the CPU, not --device {args.device}")
    known = opponents(args.device, parallel=bool(args.parallel))
    for name in args.against or ():
        if name not in known:
            mode = " with --parallel" if args.parallel else ""
            mode += f" with --device {args.device}" if args.device != "cpu" else ""
            args.parser.error(f"argument --against: {name!r} is none of {', '.join(known)}{mode}")


def _bench(path: Path, args: argparse.Namespace) -> int:
    result = run_bench(
        path,
        against=args.against,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens or 64,
        runs=args.runs or RUNS,
        device=args.device,
        threads=args.threads,
        roofline=args.roofline,
        note=_note,
    )
    roofline = result.roofline
    if args.json != "-":
        print(table(result))
    elif roofline:
        # The JSON holds the warnings too, but they must not be overlooked.
        for warning in roofline.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    _write(result, args)
    failed = [engine.failed for engine in result.engines] + [roofline.failed if roofline else None]
    return 1 if any(failed) else 0


def _parallel(path: Path, args: argparse.Namespace) -> int:
    result = run_parallel(
        path,
        clients=args.parallel,
        requests=args.requests or 4,
        against=args.against,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens or 64,
        device=args.device,
        threads=args.threads,
        note=_note,
    )
    if args.json != "-":
        print(parallel_table(result))
    _write(result, args)
    return 1 if any(engine.failed for engine in result.engines) else 0


def _write(result: BenchResult | ParallelResult, args: argparse.Namespace) -> None:
    """Writes the files that were asked for."""
    if args.json:
        text = json.dumps(dataclasses.asdict(result), indent=2)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    if args.plot:
        plot(result, args.plot)


def _llama_bench(path: Path, args: argparse.Namespace) -> int:
    result = run_llama_bench(
        path,
        against=args.against or (),
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens or 128,
        depth=args.depth or 0,
        runs=args.runs or RUNS,
        device=args.device,
        threads=args.threads,
        note=_note,
    )
    if result.speeds:
        print(FORMATS[args.format](result))
    # stdout holds nothing but the table.
    for engine, reason in result.skipped.items():
        print(f"{engine} was skipped: {reason}", file=sys.stderr)
    for engine, reason in result.failed.items():
        print(f"{engine} failed: {reason}", file=sys.stderr)
    return 1 if result.failed else 0


def _note(line: str) -> None:
    # Notes are only for a user at a terminal.
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _whole(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, not {text!r}")
    return value


def _synthetic(text: str) -> str:
    try:
        find_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r}: {error}") from error
    return text


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


def _chart(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(SUFFIXES)}, not {text!r}")
    _check_folder(path)
    return path


def _result(text: str) -> str:
    if text != "-":
        _check_folder(Path(text))
    return text


def _check_folder(path: Path) -> None:
    """Refuses a file that cannot be written, before the measurement."""
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{str(path)!r} is a folder")
