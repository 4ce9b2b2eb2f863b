"""The checkpoint that is measured: its size, and prompts that every engine can read."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from candle_llama.bench.read_checkpoint import StoredTensor, open_checkpoint, read_gguf_metadata

# tokenizer.ggml.token_type of ordinary text tokens.
GGUF_NORMAL_TOKEN = 1


@dataclass(frozen=True)
class Subject:
    """Properties of a checkpoint, read without its weights."""

    path: Path
    parameters: int
    """Elements of all tensors in the files."""
    checkpoint_bytes: int
    """Size of the files that hold weights."""
    storage_type: str
    """The storage type of most weights, as the file format names it."""
    context_length: int
    """The longest context, in tokens."""
    token_ids: NDArray[np.int64]
    """Ordinary text tokens. Special tokens are left out, because engines may act on them."""
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads config, tensor list and vocabulary.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is malformed or the model is not a Llama.
        """
        try:
            config, tensors = open_checkpoint(path)
            token_ids = _plain_token_ids(path, config)
        except KeyError as error:
            raise ValueError(f"{path}: {error} is missing") from error
        files = tuple(sorted({tensor.path for tensor in tensors.values()}))
        return cls(
            path=path,
            parameters=_parameters(tensors),
            checkpoint_bytes=sum(file.stat().st_size for file in files),
            storage_type=_storage_type(tensors),
            context_length=config.get("max_position_embeddings", 2048),
            token_ids=token_ids,
            weight_files=files,
            tensors=tensors,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token, in 16 bits."""
        keys = [t.shape[:1] for name, t in self.tensors.items() if name.endswith(".k_proj.weight")]
        return 2 * 2 * sum(map(sum, keys))

    def prompt(self, length: int, seed: Sequence[int]) -> list[int]:
        """Draws a prompt of ordinary tokens; the same for the same seed."""
        drawn: list[int] = np.random.default_rng(seed).choice(self.token_ids, size=length).tolist()
        return drawn

    def warm_page_cache(self) -> None:
        """Reads the weights once, so that no engine's loading time includes reading the disk."""
        for file in self.weight_files:
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def _parameters(tensors: dict[str, StoredTensor]) -> int:
    return sum(tensor.size for name, tensor in tensors.items() if name != "rope_freqs.weight")


def _storage_type(tensors: dict[str, StoredTensor]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.type_name] += tensor.size
    return sizes.most_common(1)[0][0]


def _plain_token_ids(path: Path, config: dict[str, Any]) -> NDArray[np.int64]:
    candidates = set(range(config["vocab_size"]))
    tokenizer = path / "tokenizer.json"
    if path.is_file():
        types = read_gguf_metadata(path).get("tokenizer.ggml.token_type", [])
        candidates -= {token_id for token_id, kind in enumerate(types) if kind != GGUF_NORMAL_TOKEN}
    elif tokenizer.exists():
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        # Models may have more rows than their tokenizer has tokens. Unigram vocabularies are lists.
        known = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        candidates &= set(known)
        candidates -= {token["id"] for token in content.get("added_tokens", [])}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value: Any = config.get(key)
        candidates -= set(value if isinstance(value, list) else [value])
    return np.array(sorted(candidates), dtype=np.int64)
