"""The command `candle-llama`: runs a subcommand, and reports an error as one line and an exit code."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from candle_llama import __version__
from candle_llama.cli import output

# Only the module of the command that runs is imported, so that no command slows down another.
COMMANDS = {
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "serve": "serve a model over HTTP, with the interface of OpenAI",
    "bench": "compare speed and memory with other engines",
    "quantize": "write a model as a GGUF file, quantised or not",
    "inspect": "show what is in a model, without loading its weights",
    "doctor": "show what this machine and this build support",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code: 0, or 1 for a failure, or 130 for Ctrl-C. Wrong usage exits with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    output.prepare_stdout()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does. Python's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if os.environ.get("CANDLE_LLAMA_TRACEBACK") == "1":
            raise
        print(f"candle-llama: error: {one_line(error)}", file=sys.stderr)
        return 1


def one_line(error: BaseException) -> str:
    """Returns the message of an error as a single line."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage in two lines; the whole usage has more than twenty."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help shows the usage\n")


def _run(arguments: list[str]) -> int:
    parser = _Parser(
        prog="candle-llama",
        description="Load and run Llama-family models.",
        epilog='MODEL or SRC is a folder, a .gguf file, a hub id such as "org/name", or "demo".',
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # No option before the command takes a value, so the first word without a dash is the command.
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    module: ModuleType | None = None
    chosen: argparse.ArgumentParser = parser
    for name, summary in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        command = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        if name == wanted:
            module = importlib.import_module(f"candle_llama.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(parser=command)
            chosen = command
    args, unknown = parser.parse_known_args(arguments)
    if unknown and module and not chosen._mutually_exclusive_groups:
        # argparse takes an optional argument for missing if it stands behind an option. This other way of
        # parsing does not, but cannot parse groups.
        rest = arguments[arguments.index(str(wanted)) + 1 :]
        again, still_unknown = chosen.parse_known_intermixed_args(rest)
        if not still_unknown:
            args, unknown = argparse.Namespace(**{**vars(args), **vars(again)}), []
    if unknown:
        # Imported here because it is slow to import and seldom needed.
        import difflib

        known = [flag for action in chosen._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if args.version:
        print(f"candle-llama {__version__}")
        return 0
    if module is None:
        parser.error(f"a command is needed: {', '.join(COMMANDS)}")
    code: int = module.run(args)
    return code
