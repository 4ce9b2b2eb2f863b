"""`candle-llama inspect MODEL`."""

import argparse
import json
from typing import Any

from candle_llama import _core, hub
from candle_llama.cli import options, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    options.add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    found = _core.inspect(str(hub.resolve(args.model, **options.finding(args))))
    if args.json:
        output.write_json(found)
    else:
        print(_report(found))
    return 0


def _report(found: dict[str, Any]) -> str:
    tensors = found["tensors"].items()
    rows = [
        ("path", found["path"]),
        ("format", found["format"]),
        ("parameters", f"{found['parameters']:,}"),
        ("tensors", f"{sum(entry['count'] for _, entry in tensors)} in all"),
        *(
            (f"  {name}", f"{entry['count']} tensors, {output.size(entry['bytes'])}")
            for name, entry in tensors
        ),
        ("lm_head", f"{found['lm_head']}: {found['lm_head_reason']}"),
        *_tokenizer_rows(found["tokenizer"]),
        *(("warning", warning) for warning in found["warnings"]),
        *(("note", note) for note in found["notes"]),
        ("config", ""),
        *((f"  {name}", json.dumps(value)) for name, value in found["config"].items()),
    ]
    return output.table(rows)


def _tokenizer_rows(tokenizer: dict[str, Any] | None) -> list[tuple[str, str]]:
    if tokenizer is None:
        return [("tokenizer", "none")]
    return [
        ("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens"),
        ("  bos_token_id", str(tokenizer["bos_token_id"])),
        ("  eos_token_id", str(tokenizer["eos_token_id"])),
        ("  chat template", "yes" if tokenizer["chat_template"] else "no"),
    ]
