"""The engines that can be compared: what they need, and when they have to be left out.

How each is driven stands in `worker`, which runs in a process of its own.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from candle_llama.bench.subject import Subject

__all__ = ["ENGINES", "OPPONENTS", "Engine"]


@dataclass(frozen=True)
class Engine:
    """An engine's requirements."""

    name: str
    modules: tuple[str, ...] = ()
    """Packages to import."""
    install: str = ""
    gguf_modules: tuple[str, ...] = ()
    """Packages needed besides for GGUF files."""
    reads_folders: bool = True
    widens_folders: bool = False
    """Keeps every weight as float32, whatever the checkpoint has."""
    widens_gguf: bool = False

    def reason_to_skip(self, subject: Subject) -> str | None:
        """Says why the engine cannot run this checkpoint here, and how to change that; None if it can."""
        if missing := _missing(self.modules):
            return f"{', '.join(missing)} not installed: {self.install}"
        if subject.path.is_dir():
            return (
                None if self.reads_folders else f"reads GGUF files only, and {subject.path.name} is a folder"
            )
        if missing := _missing(self.gguf_modules):
            return f"needs {', '.join(missing)} for GGUF files: pip install {' '.join(missing)}"
        return None

    def memory_needed(self, subject: Subject) -> int:
        """Estimates the bytes of weights in memory; activations and the runtime come on top."""
        widens = self.widens_folders if subject.path.is_dir() else self.widens_gguf
        return 4 * subject.parameters if widens else subject.checkpoint_bytes


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("cpu"),
        Engine("candle", widens_folders=True, widens_gguf=True),
        Engine("numpy", widens_folders=True, widens_gguf=True),
        Engine(
            "transformers",
            modules=("torch", "transformers"),
            install="pip install torch transformers",
            gguf_modules=("gguf", "accelerate"),
            widens_gguf=True,
        ),
        Engine(
            "llama-cpp-python",
            modules=("llama_cpp",),
            install="pip install llama-cpp-python",
            reads_folders=False,
        ),
    )
}

OPPONENTS = tuple(name for name in ENGINES if name != "cpu")
"""What the default engine, `cpu`, can be compared with."""


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]
