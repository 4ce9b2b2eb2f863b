"""The flags that commands share: how to find and load a model, and how to sample."""

import argparse
from typing import Any

from candle_llama.sampling import FIELDS

_LOAD_FLAGS = (
    "device",
    "dtype",
    "quantize",
    "compute",
    "kv_dtype",
    "engine",
    "threads",
    "context_length",
    "strict",
)
_SOURCE_FLAGS = ("revision", "token", "cache_dir", "local_files_only", "progress")


def add_model(parser: argparse.ArgumentParser, name: str = "MODEL") -> None:
    """Adds MODEL, or what else it is called, and the flags for finding it."""
    parser.add_argument("model", metavar=name, help='folder, .gguf file, hub id, or "demo"')
    group = parser.add_argument_group("finding the model")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    group.add_argument("--token", help="access token for the hub (default: the stored login, or HF_TOKEN)")
    group.add_argument("--cache-dir", metavar="FOLDER", help="where downloads are kept")
    group.add_argument("--local-files-only", action="store_true", help="stay off the network")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for loading a model."""
    group = parser.add_argument_group("loading")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0 or metal (default: auto)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="auto keeps the type in which the weights are stored",
    )
    group.add_argument(
        "--quantize", choices=("q8_0", "q4_0"), help="round float weights to 8 or 4 bits while loading"
    )
    group.add_argument(
        "--compute",
        default="auto",
        choices=("auto", "exact"),
        help="exact: float32 activations and KV cache everywhere",
    )
    group.add_argument(
        "--kv-dtype",
        default="auto",
        choices=("auto", "float16", "bfloat16", "float32"),
        help="type of cached keys and values (default: float16; with --compute exact: float32)",
    )
    group.add_argument(
        "--engine", default="auto", choices=("auto", "cpu", "candle"), help="our own decoder, or Candle's"
    )
    group.add_argument("--threads", type=int, metavar="N", help="default: the cores this process may use")
    group.add_argument("--context-length", type=int, metavar="N", help="default: the model's own")
    group.add_argument(
        "--strict", action="store_true", help="refuse what would otherwise load with a warning"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every sampling parameter."""
    group = parser.add_argument_group(
        "sampling", "what is not given comes from the model's generation_config.json"
    )
    for name, field in FIELDS.items():
        flags = ["--" + name.replace("_", "-")]
        if name == "max_new_tokens":
            flags.append("--max-tokens")
        settings: dict[str, Any] = {"dest": name, "default": None, "help": field.metadata["help"]}
        kind = field.metadata["kind"]
        if kind == "bool":
            settings |= {"action": "store_true"}
        elif kind == "choice":
            settings |= {"choices": field.metadata["choices"]}
        else:
            settings |= {"metavar": field.metadata.get("metavar", "N" if kind == "int" else "X")}
            settings |= _READERS[kind]
        group.add_argument(*flags, **settings)


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keywords for `load`."""
    return {name: getattr(args, name) for name in (*_LOAD_FLAGS, *_SOURCE_FLAGS)}


def finding(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keywords for `hub.resolve`."""
    return {name: getattr(args, name) for name in _SOURCE_FLAGS}


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the sampling parameters that were given."""
    given = {name: value for name in FIELDS if (value := getattr(args, name)) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return given


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _bias(text: str) -> tuple[int, float]:
    token_id, bias = text.split("=")
    return int(token_id), float(bias)


# argparse names a type in its messages: "invalid token ids value".
_ids.__name__ = "token ids"
_bias.__name__ = "ID=BIAS"

_READERS: dict[str, dict[str, Any]] = {
    "int": {"type": int},
    "seed": {"type": int},
    "float": {"type": float},
    "strings": {"action": "append"},
    "ints": {"type": _ids},
    "bias": {"type": _bias, "action": "append"},
}
