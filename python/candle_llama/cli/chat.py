"""`candle-llama chat MODEL [MESSAGE]`."""

import argparse
import contextlib
import json
import re
import sys

from candle_llama import Chunk, Completion, ContextLengthError, Llama, Stats, load
from candle_llama.cli import one_line, options, output
from candle_llama.options import expand_user
from candle_llama.types import Message

_HELP = """\
/reset      forget the conversation
/save FILE  write the conversation to a file, as JSON
/load FILE  go on with a conversation from a file
/exit       leave (so does Ctrl-D, or Ctrl-C twice)
/help       show this
//TEXT      send a message that begins with a slash: /TEXT
Ctrl-C      stop an answer"""


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
        elif output.stdin_is_terminal():
            return _talk(conversation)
        else:
            for line in output.stdin_lines():
                if line.strip() and not _command(conversation, line.strip()):
                    break
    return 0


class _Conversation:
    """The messages so far, and the settings for the answers."""

    def __init__(self, llm: Llama, args: argparse.Namespace) -> None:
        self._llm = llm
        self._params = options.sampling(args)
        self._stats: bool = args.stats
        self._beginning: list[Message] = []
        if args.system is not None:
            self._beginning.append({"role": "system", "content": args.system})
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self._messages: list[Message] = list(self._beginning)

    def save(self, path: str) -> None:
        """Writes the messages to a file, as a JSON list."""
        text = json.dumps(self._messages, indent=2, ensure_ascii=False)
        expand_user(path).write_text(f"{text}\n", encoding="utf-8")

    def load(self, path: str) -> None:
        """Replaces the messages by those of a file.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no conversation.
        """
        try:
            messages = json.loads(output.read_file(str(expand_user(path))))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError(f'{path} is no list of messages such as {{"role": "user", "content": "hi"}}')
        self._messages = messages

    def complete(self, message: str) -> Completion:
        """Returns the whole answer to a message."""
        with output.warnings_as_notes():
            completion = self._llm.chat(
                [*self._messages, {"role": "user", "content": message}], **self._params
            )
        if self._stats:
            output.write_stats(completion.stats)
        return completion

    def answer(self, message: str) -> None:
        """Prints the answer while it is generated. A stopped answer is kept as far as it was printed."""
        messages = [*self._messages, {"role": "user", "content": message}]
        text = ""
        last: Chunk | None = None
        try:
            with output.warnings_as_notes():
                stream = self._llm.stream_chat(messages, **self._params)
            for chunk in output.write_stream(stream):
                text += chunk.text
                last = chunk
        except ContextLengthError as error:
            raise ValueError(
                f"{error}; /reset forgets the conversation, and --on-overflow truncate_left drops its "
                "beginning"
            ) from error
        finally:
            if text:
                self._messages = [*messages, {"role": "assistant", "content": text}]
        if last is not None and last.finish_reason == "length":
            output.note(self._cut(last.stats), always=True)
        if self._stats and last is not None:
            output.write_stats(last.stats)

    def _cut(self, stats: Stats | None) -> str:
        """Says why an answer ended before its end."""
        context: int = self._llm.config.context_length
        if stats is not None and stats.prompt_tokens + stats.completion_tokens >= context:
            full = f"the context of {context} tokens is full"
            return f"the answer was cut: {full}; /reset forgets the conversation"
        return "the answer was cut at the limit of new tokens; --max-new-tokens N raises it, -1 removes it"


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


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
    name, _, path = line.partition(" ")
    path = path.strip()
    if line == "/exit":
        return False
    if line == "/reset":
        conversation.reset()
        output.note("the conversation was reset")
    elif line == "/help":
        print(_HELP)
    elif name in ("/save", "/load"):
        if not path:
            raise ValueError(f"{name} needs a file, as in {name} talk.json")
        if name == "/save":
            conversation.save(path)
        else:
            conversation.load(path)
        output.note(f"the conversation was {'saved to' if name == '/save' else 'loaded from'} {path}")
    elif line.startswith("//"):
        conversation.answer(line[1:])
    elif re.fullmatch("/[A-Za-z]+", name):
        output.note(f"{name} is no command, these are:\n{_HELP}", always=True)
    else:
        conversation.answer(line)
    return True
