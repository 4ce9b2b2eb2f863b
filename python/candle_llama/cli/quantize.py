"""`candle-llama quantize SRC DST`."""

import argparse

from candle_llama import QuantizeReport, quantize
from candle_llama.cli import options, output

_TYPES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "f16", "bf16", "f32")
_MIXTURES = ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    options.add_model(parser, name="SRC")
    parser.add_argument("destination", metavar="DST", help="the .gguf file to write")
    parser.add_argument(
        "--type",
        dest="dtype",
        type=str.lower,
        default="q4_0",
        choices=_TYPES + _MIXTURES,
        help=f"the type of all matrices: {', '.join(_TYPES)}; or one of llama.cpp's mixtures: "
        f"{', '.join(_MIXTURES)} (default: q4_0)",
        metavar="TYPE",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing DST")
    parser.add_argument(
        "--allow-requantize", action="store_true", help="also convert tensors that are already quantised"
    )
    parser.add_argument(
        "--no-tokenizer", dest="tokenizer", action="store_false", help="leave the tokenizer out"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="default: the performance cores that may be used"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    with output.warnings_as_notes(always=True) as warnings:
        report = quantize(
            args.model,
            args.destination,
            args.dtype,
            force=args.force,
            allow_requantize=args.allow_requantize,
            tokenizer=args.tokenizer,
            threads=args.threads,
            **options.finding(args),
        )
    for line in report.notes:
        output.note(line, always=True)
    if args.json:
        output.write_json({"source": args.model, **output.fields(report), "warnings": warnings})
    else:
        print(_report(report))
    return 0


def _report(report: QuantizeReport) -> str:
    rows = [("path", report.path), ("size", output.size(report.bytes)), ("time", f"{report.seconds:.1f} s")]
    rows += [
        (name, f"{entry.count} tensors, {output.size(entry.bytes)}") for name, entry in report.tensors.items()
    ]
    return output.table(rows)
