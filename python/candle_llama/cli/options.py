"""The flags that commands share: how to find and load a model, and how to sample."""

import argparse
import re
from collections.abc import Mapping
from typing import Any

from candle_llama.options import LOADING, SOURCE, Option
from candle_llama.sampling import FIELDS


def add_model(parser: argparse.ArgumentParser, name: str = "MODEL") -> None:
    """Adds the argument MODEL, which may have another name, and the flags for finding the model."""
    parser.add_argument("model", metavar=name, help='folder, .gguf file, hub id, or "demo"')
    group = parser.add_argument_group("finding the model")
    _add_flags(group, SOURCE)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for loading a model."""
    group = parser.add_argument_group("loading")
    _add_flags(group, LOADING)


def _add_flags(group: argparse._ArgumentGroup, table: Mapping[str, Option]) -> None:
    for name, option in table.items():
        flag = name.replace("_", "-")
        if option.default is True:
            group.add_argument(f"--no-{flag}", dest=name, action="store_false", help=option.help)
        elif option.default is False:
            group.add_argument(f"--{flag}", action="store_true", help=option.help)
        else:
            group.add_argument(
                f"--{flag}",
                default=option.default,
                choices=option.choices or None,
                metavar=option.metavar,
                type=int if option.is_count else str,
                help=option.help,
            )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every sampling parameter."""
    group = parser.add_argument_group("sampling", "defaults come from the model's generation_config.json")
    for name, field in FIELDS.items():
        if field.metadata["kind"] == "functions":
            continue
        flags = ["--" + name.replace("_", "-")]
        if name == "max_new_tokens":
            flags.append("--max-tokens")
        settings: dict[str, Any] = {"dest": name, "default": None, "help": field.metadata["help"]}
        kind = field.metadata["kind"]
        if kind == "bool":
            # A parameter that is on needs a flag that turns it off.
            on = field.metadata.get("on", False)
            settings |= {"action": argparse.BooleanOptionalAction if on else "store_true"}
        elif kind == "choice":
            settings |= {"choices": field.metadata["choices"]}
        else:
            settings |= {"metavar": field.metadata.get("metavar", "N" if kind == "int" else "X")}
            settings |= _READERS[kind]
        group.add_argument(*flags, **settings)


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keywords for `load`."""
    return {name: getattr(args, name) for name in (*SOURCE, *LOADING)}


def finding(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keywords for `hub.resolve`."""
    return {name: getattr(args, name) for name in SOURCE}


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the sampling parameters that were given."""
    given = {name: value for name in FIELDS if (value := getattr(args, name, None)) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return given


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _bias(text: str) -> tuple[int, float]:
    token_id, bias = text.split("=")
    return int(token_id), float(bias)


def _unescaped(text: str) -> str:
    r"""Replaces \n, \r, \t, \0, \\, \xHH and \uHHHH by what they mean in Python; keeps other backslashes."""
    return _ESCAPE.sub(lambda found: _escaped(found[1]), text)


def _escaped(code: str) -> str:
    return _ESCAPES[code] if code in _ESCAPES else chr(int(code[1:], 16))


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "\\": "\\"}
_ESCAPE = re.compile(r"\\([nrt0\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")

# argparse shows a function's name in its messages: "invalid token ids value".
_ids.__name__ = "token ids"
_bias.__name__ = "ID=BIAS"

_READERS: dict[str, dict[str, Any]] = {
    "int": {"type": int},
    "seed": {"type": int},
    "float": {"type": float},
    "text": {"type": str},
    "schema": {"type": str},
    "strings": {"type": _unescaped, "action": "append"},
    "texts": {"type": _unescaped, "action": "append"},
    "ints": {"type": _ids},
    "bias": {"type": _bias, "action": "append"},
}
