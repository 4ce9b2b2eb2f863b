"""Vocabularies and chat templates of real models, from packages that pip downloads when a test needs them.

The source package of llama-cpp-python contains llama.cpp, which has GGUF files without weights, each with
texts and the ids they must give, and the templates of many models. llama-models has Llama 3's
tokenizer.model. Nothing of them is copied into this repository.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_MODELS = "llama-models==0.3.0"
LLAMA_MODELS_SHA256 = "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"
# The folder of an unpacked source package of llama-cpp-python, for machines without a package index.
UNPACKED = "CANDLE_LLAMA_LLAMA_CPP"


def models_folder() -> Path:
    """The folder of vocabularies (`ggml-vocab-*.gguf`, `.inp`, `.out`) and `templates/*.jinja`.

    It is downloaded once (76 MB) and kept in the cache folder. Skips the test if the download fails.
    """
    models = Path("vendor", "llama.cpp", "models")
    if given := os.environ.get(UNPACKED):
        folder = Path(given) / models
        assert folder.is_dir(), f"{UNPACKED}: there is no {folder}"
        return folder
    return _package(LLAMA_CPP, LLAMA_CPP_SHA256, f"llama_cpp_python-0.3.36/{models.as_posix()}")


def llama_3_folder() -> Path:
    """A folder with Llama 3's tokenizer.model. Skips the test if the download fails."""
    return _package(LLAMA_MODELS, LLAMA_MODELS_SHA256, "llama_models/llama3")


def _package(requirement: str, sha256: str, part: str) -> Path:
    """The folder `part` of a package."""
    reason = _fetch(requirement, sha256, part)
    if reason:
        pytest.skip(f"cannot download {requirement}: {reason}")
    return _cache_folder() / requirement / part


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "candle-llama" / "test"


@cache
def _fetch(requirement: str, sha256: str, part: str) -> str | None:
    """Puts `part` of a package into the cache folder, unless it is there. Returns the reason if it fails."""
    target = _cache_folder() / requirement
    if target.is_dir():
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked in a temporary folder and renamed when complete: a killed test leaves nothing incomplete, and
    # concurrent processes do not disturb each other.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wanted, downloaded, unpacked = (
            Path(scratch, name) for name in ("wanted.txt", "downloaded", "unpacked")
        )
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--dest", str(downloaded), "--requirement", str(wanted)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        except subprocess.TimeoutExpired:
            return "pip took more than 100 seconds"
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        (archive,) = downloaded.iterdir()
        _unpack(archive, part, unpacked)
        try:
            unpacked.rename(target)
        except OSError:
            # Another process was quicker.
            if not target.is_dir():
                raise
    return None


def _unpack(archive: Path, part: str, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            package.extractall(folder, [name for name in package.namelist() if name.startswith(part)])
    else:
        with tarfile.open(archive) as package:
            wanted = [member for member in package if member.name.startswith(part)]
            package.extractall(folder, wanted, filter="data")
