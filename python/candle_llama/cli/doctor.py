"""`candle-llama doctor`."""

import argparse
import platform
from importlib import metadata
from typing import Any

from candle_llama import _core, hub
from candle_llama.cli import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    found: dict[str, Any] = {
        **_core.doctor(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("numpy", "huggingface_hub")},
    }
    try:
        found["demo"] = str(hub.resolve("demo"))
    except FileNotFoundError:
        found["demo"] = None
    if args.json:
        output.write_json(found)
    else:
        print(_report(found, hub.DEMO_INSTALL))
    return 0


def _report(found: dict[str, Any], demo_install: str) -> str:
    quota = found["quota"]
    return output.table(
        [
            ("candle-llama", found["version"]),
            ("python", f"{found['python']} on {found['platform']}"),
            *((name, version or "not installed") for name, version in found["packages"].items()),
            ("cpu", found["cpu"]),
            ("isa", f"{found['isa']} (available: {', '.join(found['isa_available'])})"),
            ("cores", f"{found['cores']}, quota {'none' if quota is None else f'{quota:g}'}"),
            ("threads", str(found["threads"])),
            (
                "memory",
                f"{output.size(found['memory_available'])} free of {output.size(found['memory_total'])}",
            ),
            ("features", ", ".join(found["features"]) or "none"),
            ("devices", ", ".join(found["devices"])),
            ("demo", found["demo"] or f"not installed: {demo_install}"),
        ]
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
