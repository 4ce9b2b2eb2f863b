"""`candle-llama chat MODEL [MESSAGE]`."""

import argparse
import contextlib
import sys

from candle_llama import Completion, Llama, Stats, load
from candle_llama.cli import one_line, options, output

_HELP = """\
/reset  forget the conversation
/exit   leave (so does Ctrl-D, or Ctrl-C twice)
/help   show this
Ctrl-C  stop an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    options.add_model(parser)
    parser.add_argument(
        "message",
        metavar="MESSAGE",
        nargs="?",
        help='one message to answer; "-" reads it from stdin; without MESSAGE, every line typed is one',
    )
    parser.add_argument("--system", metavar="TEXT", help="begin the conversation with this system message")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text (needs MESSAGE)"
    )
    parser.add_argument("-v", "--stats", action="store_true", help="print speeds to stderr")
    options.add_loading(parser)
    options.add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.json and args.message is None:
        args.parser.error("--json needs MESSAGE")
    if args.logprobs is not None and not args.json:
        args.parser.error("--logprobs needs --json")
    message = output.read_stdin() if args.message == "-" else args.message
    with output.warnings_as_notes() as notes:
        llm = load(args.model, **options.loading(args))
    with llm:
        conversation = _Conversation(llm, args)
        if args.json:
            completion = conversation.complete(message)
            output.write_json({"model": args.model, **output.fields(completion), "warnings": notes})
        elif message is not None:
            conversation.answer(message)
        elif sys.stdin.isatty():
            return _talk(conversation)
        else:
            for line in sys.stdin:
                if line.strip() and not _command(conversation, line.strip()):
                    break
    return 0


class _Conversation:
    """The messages so far, and the settings for the answers."""

    def __init__(self, llm: Llama, args: argparse.Namespace) -> None:
        self._llm = llm
        self._params = options.sampling(args)
        self._stats: bool = args.stats
        self._beginning = [{"role": "system", "content": args.system}] if args.system is not None else []
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self._messages: list[dict[str, str]] = list(self._beginning)

    def complete(self, message: str) -> Completion:
        """Returns the whole answer to a message."""
        completion = self._llm.chat([*self._messages, {"role": "user", "content": message}], **self._params)
        if self._stats:
            output.write_stats(completion.stats)
        return completion

    def answer(self, message: str) -> None:
        """Prints the answer while it is generated. A stopped answer is kept as far as it was printed."""
        messages = [*self._messages, {"role": "user", "content": message}]
        text = ""
        stats: Stats | None = None
        try:
            for chunk in output.write_stream(self._llm.stream_chat(messages, **self._params)):
                text += chunk.text
                stats = chunk.stats
        finally:
            if text:
                self._messages = [*messages, {"role": "assistant", "content": text}]
        if self._stats:
            output.write_stats(stats)


def _talk(conversation: _Conversation) -> int:
    """Reads messages from a terminal until the user leaves."""
    # Importing readline gives input() line editing and a history.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    output.note("/help shows the commands")
    interrupted = False
    while True:
        try:
            line = input("> ").strip()
            interrupted = False
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            if interrupted:
                raise
            interrupted = True
            output.note("Ctrl-C again, Ctrl-D or /exit leaves")
            continue
        try:
            if line and not _command(conversation, line):
                return 0
        except KeyboardInterrupt:
            output.note("stopped")
        except Exception as error:
            # A message that cannot be answered, such as one that exceeds the context, must not end the
            # conversation.
            print(f"candle-llama: error: {one_line(error)}", file=sys.stderr)


def _command(conversation: _Conversation, line: str) -> bool:
    """Executes a line: a command, or a message to answer. Returns False if the user leaves."""
    if line == "/exit":
        return False
    if line == "/reset":
        conversation.reset()
        output.note("the conversation was reset")
    elif line == "/help":
        print(_HELP)
    else:
        conversation.answer(line)
    return True
