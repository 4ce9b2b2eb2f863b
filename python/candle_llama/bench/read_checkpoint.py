"""Reads checkpoints with NumPy alone, for the NumPy model: every weight becomes float32 (or float64).

Two formats: a folder with config.json and safetensors (one file or shards), and a GGUF file. Both give
Hugging Face's names, shapes `(out_features, in_features)` and a config in config.json's spelling.

Sources: the safetensors README for its header; ggml's `docs/gguf.md` for GGUF; llama.cpp's
`convert_hf_to_gguf.py` for the permutation of the query and key rows.
"""

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from candle_llama.bench.numpy_rope import attention_factor
from candle_llama.bench.storage_types import STORAGE_TYPES

__all__ = ["StoredTensor", "open_checkpoint", "read_checkpoint", "read_gguf_metadata"]

Array = NDArray[Any]

GGUF_MAGIC = b"GGUF"
# GGUF's numbers of the value types with a fixed size, and their format characters in `struct`.
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING = 8
GGUF_ARRAY = 9
# ggml's numbers of tensor types.
GGML_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
    30: "BF16",
}
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Parameters of `rope_scaling` by transformers' names, and the keys after `llama.rope.scaling.`.
GGUF_ROPE_SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    path: Path
    offset: int
    """Position of its first byte in the file."""
    type_name: str
    shape: tuple[int, ...]
    permuted_heads: int = 0
    """Number of heads, if the rows are in llama.cpp's order; 0 if they are in Hugging Face's."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file.

        Raises:
            ValueError: If the type is not supported.
        """
        storage = STORAGE_TYPES.get(self.type_name)
        if storage is None:
            raise ValueError(f"{self.path}: the size of {self.type_name} is not known")
        return self.size // storage.block_len * storage.block.itemsize

    def read(self, dtype: DTypeLike = np.float32) -> Array:
        """Reads the tensor and converts it to `dtype`.

        Raises:
            ValueError: If the type is not supported, the size is no whole number of blocks, or the file is
                too short.
        """
        storage = STORAGE_TYPES.get(self.type_name)
        if storage is None or self.size % storage.block_len:
            raise ValueError(f"{self.path}: cannot read {self.type_name} of shape {self.shape}")
        count = self.size // storage.block_len
        if self.offset + count * storage.block.itemsize > self.path.stat().st_size:
            raise ValueError(f"{self.path} is truncated")
        stored = np.fromfile(self.path, dtype=storage.block, count=count, offset=self.offset)
        values = storage.decode(stored).reshape(self.shape).astype(dtype, copy=False)
        if self.permuted_heads:
            # llama.cpp rotates neighbouring rows of a head, Hugging Face rotates its two halves.
            half = len(values) // self.permuted_heads // 2
            pairs = values.reshape(self.permuted_heads, half, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(self.shape)
        return values


def read_checkpoint(
    path: str | Path, dtype: DTypeLike = np.float32
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Reads a whole checkpoint.

    Args:
        path: A folder with config.json and safetensors, or a GGUF file.
        dtype: float32 or float64.

    Returns:
        The config in config.json's spelling, and the tensors by Hugging Face's names.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed, truncated or of an unsupported type.
    """
    config, stored = open_checkpoint(path)
    return config, {name: tensor.read(dtype) for name, tensor in stored.items()}


def open_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Reads the config and the list of tensors, but no weights; see `read_checkpoint`."""
    path = Path(path)
    if path.is_dir():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return config, _open_safetensors_folder(path)
    return _open_gguf(path)


def _open_safetensors_folder(folder: Path) -> dict[str, StoredTensor]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _open_safetensors(folder / "model.safetensors")
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shards = {name: _open_safetensors(folder / name) for name in sorted(set(weight_map.values()))}
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    # Layout: the header's length in 8 bytes, the header as JSON, then the data. Offsets count from the data.
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > path.stat().st_size - 8:
            raise ValueError(f"{path} is truncated")
        header = json.loads(file.read(length))
    return {
        name: StoredTensor(path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


class _GgufReader:
    """A cursor over the header of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.data[:4] != GGUF_MAGIC or self.unpack("4xI")[0] not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise ValueError(f"{self.path} is truncated")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def string(self) -> str:
        # Vocabularies may hold bytes that are not valid UTF-8.
        return self.take(self.unpack("Q")[0]).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == GGUF_STRING:
            return self.string()
        if kind == GGUF_ARRAY:
            item, count = self.unpack("IQ")
            if item in GGUF_SCALARS:
                # `take` checks the size before struct gets a format of that count.
                raw = self.take(count * struct.calcsize(GGUF_SCALARS[item]))
                return list(struct.unpack(f"<{count}{GGUF_SCALARS[item]}", raw))
            return [self.value(item) for _ in range(count)]
        if kind not in GGUF_SCALARS:
            raise ValueError(f"{self.path}: unknown metadata type {kind}")
        return self.unpack(GGUF_SCALARS[kind])[0]


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """Reads the key/value part of a GGUF file."""
    return _read_gguf_header(Path(path))[0]


def _read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    reader = _GgufReader(path)
    tensor_count, metadata_count = reader.unpack("QQ")
    metadata = {}
    for _ in range(metadata_count):
        key = reader.string()
        metadata[key] = reader.value(reader.unpack("I")[0])
    entries = []
    for _ in range(tensor_count):
        name = reader.string()
        dimensions = reader.unpack(f"{reader.unpack('I')[0]}Q")
        # ggml lists the innermost dimension first.
        entries.append((name, dimensions[::-1], *reader.unpack("IQ")))
    alignment = metadata.get("general.alignment", 32)
    data = -(-reader.position // alignment) * alignment
    tensors = {
        name: StoredTensor(path, data + offset, GGML_TYPES.get(kind, f"ggml type {kind}"), shape)
        for name, shape, kind, offset in entries
    }
    return metadata, tensors


def _open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    metadata, stored = _read_gguf_header(path)
    config = _config_from_gguf(path, metadata, stored)
    tensors = {}
    for name, tensor in stored.items():
        heads = 0
        if ".attn_q." in name:
            heads = config["num_attention_heads"]
        elif ".attn_k." in name:
            heads = config["num_key_value_heads"]
        tensors[_hugging_face_name(name)] = StoredTensor(
            path, tensor.offset, tensor.type_name, tensor.shape, heads
        )
    return config, tensors


def _hugging_face_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{GGUF_NAMES[part]}.{suffix}" if part in GGUF_NAMES else name
    return f"{GGUF_NAMES[stem]}.{suffix}" if stem in GGUF_NAMES else name


def _config_from_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: architecture {architecture!r} is not llama")
    heads = metadata["llama.attention.head_count"]
    config = {
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length", metadata["llama.embedding_length"] // heads),
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": metadata["llama.context_length"],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling} | {
            parameter: metadata[f"llama.rope.scaling.{key}"]
            for parameter, key in GGUF_ROPE_SCALING.items()
            if f"llama.rope.scaling.{key}" in metadata
        }
        if "llama.rope.scaling.attn_factor" in metadata:
            own = attention_factor(config)
            config["rope_scaling"]["attention_factor"] = own * metadata["llama.rope.scaling.attn_factor"]
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        if f"tokenizer.ggml.{name}_token_id" in metadata:
            config[key] = metadata[f"tokenizer.ggml.{name}_token_id"]
    return config
