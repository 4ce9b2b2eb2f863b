"""Writes checkpoints of well-known shapes with random weights: measuring needs no gated download.

`write_synthetic` writes the same files as transformers' `save_pretrained`: config.json, bfloat16 safetensors
in shards, and a tokenizer. With `name:TYPE` it converts that folder to a GGUF file. Memory is bounded, as all
matrices are filled from one block of random numbers, each from another offset; the block is scaled once per
matrix width.
"""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_llama import CandleLlamaError, _core, quantize
from candle_llama.bench.shapes import SHAPES, Shape
from candle_llama.bench.storage_types import STORAGE_TYPES

__all__ = [
    "GGUF_TYPES",
    "byte_alphabet",
    "byte_level_tokenizer",
    "find_shape",
    "safetensors_header",
    "to_bfloat16",
    "write_json",
    "write_synthetic",
]

# The types and mixtures of types in which `quantize` stores matrices.
GGUF_TYPES = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "F32"),
    *("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
)

# A prime, so that no two rows of a matrix begin at the same offset of the block.
BLOCK_LEN = 4_194_301
SHARD_BYTES = 5_000_000_000
# Bytes that must stay free on the disk.
SPARE_BYTES = 1_000_000_000
BFLOAT16_ONE = 0x3F80
SEED = 0


def default_cache_dir() -> Path:
    """Returns the folder under which synthetic checkpoints are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says to ignore relative paths.
    root = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    return root / "candle-llama" / "synthetic"


def write_synthetic(
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Writes a checkpoint of a well-known shape, or finds one that was written before.

    Args:
        name: A name or an alias of `SHAPES`, such as "llama-3.2-1b", for a folder in bfloat16; with one of
            `GGUF_TYPES` after a colon, such as "llama-3.2-1b:Q4_0", for a GGUF file. The folder from which
            the file is made is kept too, but the file does not need it.
        cache_dir: Where to keep it; None is `~/.cache/candle-llama/synthetic`.
        note: Called with a line about each step.

    Returns:
        The folder or file, which exists only if it is complete.

    Raises:
        ValueError: If there is no such shape or type.
        OSError: If the disk has too little room (ENOSPC), or cannot be written.
    """
    shape, gguf_type = find_shape(name)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    return _write_gguf(shape, gguf_type, folder, note) if gguf_type else _write(shape, folder, note)


def find_shape(name: str) -> tuple[Shape, str | None]:
    """Returns the shape that `write_synthetic` means by a name, and the GGUF type if it names one.

    Raises:
        ValueError: If there is no such shape or type.
    """
    shape_name, colon, gguf_type = name.partition(":")
    shape = next((shape for shape in SHAPES if shape_name in (shape.name, *shape.aliases)), None)
    if shape is None:
        raise ValueError(f"no shape {shape_name!r}: choose from {', '.join(shape.name for shape in SHAPES)}")
    if not colon:
        return shape, None
    if gguf_type.upper() not in GGUF_TYPES:
        raise ValueError(f"no type {gguf_type!r}: choose from {', '.join(GGUF_TYPES)}")
    return shape, gguf_type.upper()


def _write_gguf(shape: Shape, gguf_type: str, cache_dir: Path, note: Callable[[str], None] | None) -> Path:
    path = cache_dir / f"{shape.name}-{gguf_type}.gguf"
    if _is_file_of(path, shape):
        return path
    folder = _write(shape, cache_dir, note)
    # Most matrices of a mixture have the type that gives it its name.
    storage = STORAGE_TYPES[gguf_type.removesuffix("_S").removesuffix("_M")]
    _check_room(path.name, cache_dir, shape.parameters * storage.block.itemsize // storage.block_len)
    if note is not None:
        note(f"writing {path}")
    quantize(folder, path, gguf_type.lower(), force=True)
    return path


def _is_file_of(path: Path, shape: Shape) -> bool:
    """Returns whether the file exists, is complete, and has this shape."""
    try:
        found = _core.inspect(str(path))
    except (OSError, CandleLlamaError):
        return False
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    same = all(found["config"][key] == shape.config[key] for key in sizes)
    return same and found["tokenizer"] is not None


def _check_room(what: str, cache_dir: Path, total: int) -> None:
    """Raises OSError if the disk has too little room."""
    free = shutil.disk_usage(cache_dir).free
    if free < total + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {total / 1e9:.1f} GB and {SPARE_BYTES / 1e9:.0f} GB to spare, "
            f"{free / 1e9:.1f} GB are free",
            str(cache_dir),
        )


def _write(shape: Shape, cache_dir: Path, note: Callable[[str], None] | None) -> Path:
    folder = cache_dir / shape.name
    shards = _shards(shape.tensors())
    if _is_complete(folder, shape, shards):
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(cache_dir, shape.name)
    total = 2 * shape.parameters
    _check_room(shape.name, cache_dir, total)
    if note is not None:
        note(f"writing {total / 1e9:.1f} GB of random weights to {folder}")
    # Written under a temporary name and then renamed, so that a folder of this name is complete.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{shape.name}-{os.getpid()}-", dir=cache_dir))
    try:
        _write_files(unfinished, shape, shards)
        unfinished.chmod(0o755)
        if folder.exists():
            # It is from another version, or damaged.
            shutil.rmtree(folder)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was quicker.
            if not _is_complete(folder, shape, shards):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _shards(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Splits the tensors, in order, into files of at most `SHARD_BYTES`, or of a single larger tensor."""
    parts: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        if not parts or size > room:
            parts.append({})
            room = SHARD_BYTES
        parts[-1][name] = shape
        room -= size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


def _is_complete(folder: Path, shape: Shape, shards: Mapping[str, Mapping[str, tuple[int, ...]]]) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in shards}
    except (OSError, ValueError):
        return False
    return config == shape.config and all(
        sizes[name] == len(safetensors_header(tensors, "BF16", 2)) + 2 * sum(map(math.prod, tensors.values()))
        for name, tensors in shards.items()
    )


def _remove_leftovers(cache_dir: Path, name: str) -> None:
    """Removes the temporary folders of writers that were killed, but not those of running ones."""
    for leftover in cache_dir.glob(f".{name}-*-*"):
        writer = leftover.name.removeprefix(f".{name}-").split("-")[0]
        if writer.isdigit() and not _is_running(int(writer)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    if os.name == "nt":
        # On Windows, os.kill would end the process.
        return True
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write_files(folder: Path, shape: Shape, shards: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    numbers = _Numbers()
    weight_map: dict[str, str] = {}
    for file_name, tensors in shards.items():
        weight_map |= dict.fromkeys(tensors, file_name)
        with (folder / file_name).open("wb") as file:
            file.write(safetensors_header(tensors, "BF16", 2))
            for tensor in tensors.values():
                for part in numbers.parts(tensor):
                    file.write(part.astype("<u2", copy=False).data)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    bos, eos = (shape.special_tokens[shape.config[key]] for key in ("bos_token_id", "eos_token_id"))
    write_json(folder / "tokenizer.json", _tokenizer(shape))
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": bos,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos,
            "model_max_length": shape.config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(folder / "config.json", dict(shape.config))


class _Numbers:
    """Random weights as bfloat16 bits: a normal distribution whose deviation keeps activations in range."""

    def __init__(self) -> None:
        self.block = np.random.default_rng(SEED).standard_normal(BLOCK_LEN, dtype=np.float32)
        self.scaled: dict[int, NDArray[np.uint16]] = {}
        self.offset = 0

    def parts(self, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint16]]:
        """Yields a tensor's elements in order, in pieces: ones for a norm, random numbers for a matrix."""
        if len(shape) == 1:
            yield np.full(shape, BFLOAT16_ONE, dtype=np.uint16)
            return
        width = shape[1]
        if width not in self.scaled:
            self.scaled[width] = to_bfloat16(self.block / np.float32(math.sqrt(width)))
        block = self.scaled[width]
        left = math.prod(shape)
        while left:
            part = block[self.offset : self.offset + left]
            left -= part.size
            self.offset = (self.offset + part.size) % BLOCK_LEN
            yield part


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to the nearest bfloat16, ties to even, and returns its bits; finite values only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def safetensors_header(tensors: Mapping[str, tuple[int, ...]], type_name: str, width: int) -> bytes:
    """Returns the part of a safetensors file before the data: the header's length, then the header in JSON.

    Args:
        tensors: Shapes by name, in the order of the data.
        type_name: "F32", "F16" or "BF16".
        width: Bytes per element.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + width * math.prod(shape)
        header[name] = {"dtype": type_name, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces align the data.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def byte_alphabet() -> list[str]:
    """Returns the character that GPT-2's byte-level tokenizers write for each of the 256 bytes."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    rest = iter(range(256, 512))
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]


def byte_level_tokenizer(
    vocabulary: Mapping[str, int],
    special_tokens: Mapping[str, int],
    *,
    merges: Sequence[Sequence[str]] = (),
    post_processor: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the contents of a tokenizer.json: byte-level BPE, as GPT-2 and Llama 3 use it.

    Args:
        vocabulary: Ids by token.
        special_tokens: Ids of the tokens that are looked for before the text is split.
        merges: Pairs of tokens that become one, the most important first.
        post_processor: The tokenizer's step that adds tokens around a text; None adds none.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, token_id in special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": post_processor or byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": [list(merge) for merge in merges],
        },
    }


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _tokenizer(shape: Shape) -> dict[str, Any]:
    """Returns a tokenizer with a token for each byte; no text gives the other tokens of the vocabulary."""
    special = shape.special_tokens
    alphabet = iter(byte_alphabet())
    # Special tokens are included: the library would give missing ones new ids, after the vocabulary's end.
    vocabulary = {
        special.get(token_id) or next(alphabet, f"<filler_{token_id}>"): token_id
        for token_id in range(shape.config["vocab_size"])
    }
    return byte_level_tokenizer(vocabulary, {token: token_id for token_id, token in special.items()})
