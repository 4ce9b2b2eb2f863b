"""`candle-llama generate MODEL PROMPT`."""

import argparse

from candle_llama import Stats, load
from candle_llama.cli import options, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    options.add_model(parser)
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help='text to continue; "-", or nothing if stdin is no terminal, reads it from stdin',
    )
    parser.add_argument("--file", metavar="FILE", help="read the prompt from this file")
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="answer the prompt as in a chat that begins with this system message",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("-v", "--stats", action="store_true", help="print speeds to stderr")
    options.add_loading(parser)
    options.add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.logprobs is not None and not args.json:
        args.parser.error("--logprobs needs --json")
    prompt = _prompt(args)
    messages = None
    if args.system is not None:
        messages = [{"role": "system", "content": args.system}, {"role": "user", "content": prompt}]
    with output.warnings_as_notes() as notes:
        llm = load(args.model, **options.loading(args))
    params = options.sampling(args)
    stats: Stats | None = None
    with llm:
        if args.json:
            with output.warnings_as_notes() as more:
                completion = llm.chat(messages, **params) if messages else llm.generate(prompt, **params)
            notes += more
            output.write_json({"model": args.model, **output.fields(completion), "warnings": notes})
            stats = completion.stats
        else:
            with output.warnings_as_notes():
                stream = llm.stream_chat(messages, **params) if messages else llm.stream(prompt, **params)
            for chunk in output.write_stream(stream):
                stats = chunk.stats
    if args.stats:
        output.write_stats(stats)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.file is not None:
        if args.prompt is not None:
            args.parser.error("give either PROMPT or --file")
        return output.read_file(args.file)
    if args.prompt is not None and args.prompt != "-":
        text: str = args.prompt
        return text
    if args.prompt is None and output.stdin_is_terminal():
        args.parser.error("PROMPT is missing: give it here, with --file, or through a pipe")
    text = output.read_stdin()
    if not text:
        args.parser.error("PROMPT is missing, and stdin is empty")
    return text
