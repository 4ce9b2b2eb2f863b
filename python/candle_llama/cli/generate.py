"""`candle-llama generate MODEL PROMPT`."""

import argparse

from candle_llama import Stats, load
from candle_llama.cli import options, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    options.add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", help='text to continue; "-" reads it from stdin')
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("-v", "--stats", action="store_true", help="print speeds to stderr")
    options.add_loading(parser)
    options.add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.logprobs is not None and not args.json:
        args.parser.error("--logprobs needs --json")
    prompt = output.read_stdin() if args.prompt == "-" else args.prompt
    with output.warnings_as_notes() as notes:
        llm = load(args.model, **options.loading(args))
    params = options.sampling(args)
    stats: Stats | None = None
    with llm:
        if args.json:
            completion = llm.generate(prompt, **params)
            output.write_json({"model": args.model, **output.fields(completion), "warnings": notes})
            stats = completion.stats
        else:
            for chunk in output.write_stream(llm.stream(prompt, **params)):
                stats = chunk.stats
    if args.stats:
        output.write_stats(stats)
    return 0
