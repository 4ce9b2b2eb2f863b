"""The engines that can be compared: what they need, and when they must be skipped.

The code that runs each engine is in `worker`, which has its own process.
"""

import importlib.util
from dataclasses import dataclass

from candle_llama.bench.subject import Subject

__all__ = [
    "ENGINES",
    "GPU_OPPONENTS",
    "OPPONENTS",
    "PARALLEL_OPPONENTS",
    "Engine",
    "default_engine",
    "opponents",
]

# Packages whose name differs from that of their module.
PACKAGES = {"llama_cpp": "llama-cpp-python"}


@dataclass(frozen=True)
class Engine:
    """An engine's requirements."""

    name: str
    modules: tuple[str, ...] = ()
    """Modules that the engine needs."""
    gguf_modules: tuple[str, ...] = ()
    """Modules that GGUF files need in addition."""
    reads_folders: bool = True
    float32_from_folders: bool = False
    """Whether all weights of a folder become float32 in memory, whatever their stored type."""
    float32_from_gguf: bool = False
    """The same for GGUF files."""
    one_at_a_time: bool = False
    """Whether a model object serves one request at a time, so that clients wait for each other."""

    def reason_to_skip(self, subject: Subject) -> str | None:
        """Returns why the engine cannot run this checkpoint here, and how to change that; None if it can."""
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
        """Estimates the bytes of the weights in memory, without activations and the runtime."""
        is_float32 = self.float32_from_folders if subject.path.is_dir() else self.float32_from_gguf
        return 4 * subject.parameters if is_float32 else subject.checkpoint_bytes


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("cpu"),
        Engine("tensor"),
        Engine("candle", float32_from_folders=True, float32_from_gguf=True),
        Engine("numpy", float32_from_folders=True, float32_from_gguf=True),
        Engine(
            "transformers",
            modules=("torch", "transformers"),
            gguf_modules=("gguf", "accelerate"),
            float32_from_gguf=True,
            one_at_a_time=True,
        ),
        Engine("llama-cpp-python", modules=("llama_cpp",), reads_folders=False, one_at_a_time=True),
        Engine("xllamacpp", modules=("xllamacpp",), reads_folders=False),
    )
}

OPPONENTS = ("tensor", "candle", "numpy", "transformers", "llama-cpp-python")
"""The engines that the default engine, `cpu`, can be compared with, prompt by prompt."""

PARALLEL_OPPONENTS = ("xllamacpp", "llama-cpp-python")
"""Those with which it can be compared while several clients use them at the same time."""

GPU_OPPONENTS = ("candle", "transformers")
"""Those with which `tensor`, the default engine of a GPU, can be compared there, with clients too. The others
run on the CPU only, or are measured there only."""


def default_engine(device: str) -> str:
    """Returns the engine that every benchmark on this device measures."""
    return "cpu" if device == "cpu" else "tensor"


def opponents(device: str, *, parallel: bool = False) -> tuple[str, ...]:
    """Returns the engines that the default engine can be compared with on this device.

    Args:
        device: "cpu", or the name of a GPU.
        parallel: Whether several clients use each engine at the same time.
    """
    if device != "cpu":
        return GPU_OPPONENTS
    return PARALLEL_OPPONENTS if parallel else OPPONENTS
