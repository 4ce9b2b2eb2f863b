"""The engines that can be compared: what they need, and when they have to be left out.

How each is driven stands in `worker`, which runs in a process of its own.
"""

import importlib.util
from dataclasses import dataclass

from candle_llama.bench.subject import Subject

__all__ = ["ENGINES", "OPPONENTS", "Engine"]

# What to install for a module of another name.
PACKAGES = {"llama_cpp": "llama-cpp-python"}


@dataclass(frozen=True)
class Engine:
    """An engine's requirements."""

    name: str
    modules: tuple[str, ...] = ()
    """Packages to import."""
    gguf_modules: tuple[str, ...] = ()
    """Packages needed besides for GGUF files."""
    reads_folders: bool = True
    widens_folders: bool = False
    """Keeps every weight as float32, whatever the checkpoint has."""
    widens_gguf: bool = False

    def reason_to_skip(self, subject: Subject) -> str | None:
        """Says why the engine cannot run this checkpoint here, and how to change that; None if it can."""
        is_folder = subject.path.is_dir()
        if is_folder and not self.reads_folders:
            return f"reads GGUF files only, and {subject.path.name} is a folder"
        needed = self.modules if is_folder else self.modules + self.gguf_modules
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if not missing:
            return None
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        return f"{', '.join(missing)} not installed: pip install {packages}"

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
            gguf_modules=("gguf", "accelerate"),
            widens_gguf=True,
        ),
        Engine("llama-cpp-python", modules=("llama_cpp",), reads_folders=False),
    )
}

OPPONENTS = tuple(name for name in ENGINES if name != "cpu")
"""What the default engine, `cpu`, can be compared with."""
