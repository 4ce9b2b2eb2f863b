"""`candle-llama serve MODEL`."""

import argparse
import ipaddress
import logging
import os
import sys

from candle_llama import load
from candle_llama.cli import options, output

_KEY = "CANDLE_LLAMA_API_KEY"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_LEVELS = ("critical", "error", "warning", "info", "debug")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    options.add_model(parser)
    group = parser.add_argument_group("serving")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    group.add_argument("--port", type=_port, default=8000, help="0: any free port (default: 8000)")
    group.add_argument(
        "--api-key", metavar="KEY", help=f"ask clients for this key (default: the variable {_KEY}, or none)"
    )
    group.add_argument("--served-model-name", metavar="NAME", help="the model's name for clients")
    group.add_argument(
        "--max-queue",
        type=_positive,
        default=256,
        metavar="N",
        help="most answers that run or wait; others get status 429 (default: 256)",
    )
    group.add_argument(
        "--max-prompt-tokens", type=_positive, metavar="N", help="default: what the context holds"
    )
    group.add_argument(
        "--max-body-bytes", type=_positive, default=16 * 1024**2, metavar="BYTES", help="default: 16 MiB"
    )
    group.add_argument(
        "--grace-seconds",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="on Ctrl-C and SIGTERM, let requests end for so long (default: 10)",
    )
    group.add_argument("--log-level", choices=_LEVELS, default="warning", help="default: warning")
    options.add_loading(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    try:
        from candle_llama.server import build_app
        from candle_llama.server import run as server
    except ImportError as error:
        raise ImportError(
            f"serve needs packages that are not installed ({error.name}): pip install 'candle-llama[server]'"
        ) from None
    key = args.api_key if args.api_key is not None else os.environ.get(_KEY) or None
    # Before the model is loaded: an address in use is an error at once.
    with server.listen(args.host, args.port) as listener:
        is_private = _is_loopback(listener.getsockname()[0])
        if key is None and not is_private:
            print(
                f"candle-llama: warning: everybody who reaches {args.host} can use this server: "
                "set an --api-key",
                file=sys.stderr,
            )
        with output.warnings_as_notes():
            llm = load(args.model, **options.loading(args))
        with llm:
            app = build_app(
                llm,
                api_key=key,
                served_model_name=args.served_model_name,
                max_queue=args.max_queue,
                max_prompt_tokens=args.max_prompt_tokens,
                max_body_bytes=args.max_body_bytes,
                # Without a key, a browser's other pages must not get in by names of their own.
                allowed_hosts=(*_LOOPBACK_NAMES, args.host) if key is None and is_private else None,
            )
            logging.captureWarnings(True)
            server.run(app, listener, log_level=args.log_level, grace_seconds=args.grace_seconds)
    return 0


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 2**16:
        raise ValueError
    return port


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86_400:
        raise ValueError
    return seconds


# argparse shows a function's name in its messages: "invalid port value".
_port.__name__ = "port"
_positive.__name__ = "number"
_seconds.__name__ = "seconds"
