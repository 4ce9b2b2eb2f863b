"""The checkpoint that is measured: its size, and prompts that every engine can read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from candle_llama.bench.read_checkpoint import StoredTensor, open_checkpoint, read_gguf_metadata

# tokenizer.ggml.token_type of tokens that stand for text.
GGUF_NORMAL_TOKEN = 1


@dataclass(frozen=True)
class Subject:
    """A checkpoint's facts, read without its weights."""

    path: Path
    parameters: int
    """Elements of all tensors in the files."""
    checkpoint_bytes: int
    """Size of the files that hold weights."""
    context_length: int
    """Positions that the model was made for."""
    token_ids: NDArray[np.int64]
    """Tokens that stand for text: no special ones, whose meaning engines may act upon."""
    weight_files: tuple[Path, ...]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads config, tensor list and vocabulary.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is malformed or the model is no Llama.
        """
        config, tensors = open_checkpoint(path)
        files = tuple(sorted({tensor.path for tensor in tensors.values()}))
        return cls(
            path=path,
            parameters=_parameters(tensors),
            checkpoint_bytes=sum(file.stat().st_size for file in files),
            context_length=config.get("max_position_embeddings", 2048),
            token_ids=_plain_token_ids(path, config),
            weight_files=files,
        )

    def prompt(self, length: int, seed: Sequence[int]) -> list[int]:
        """Draws a prompt of plain tokens; the same for the same seed."""
        drawn: list[int] = np.random.default_rng(seed).choice(self.token_ids, size=length).tolist()
        return drawn

    def warm_page_cache(self) -> None:
        """Reads the weights once, so that no engine's loading time contains the disk's."""
        for file in self.weight_files:
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def _parameters(tensors: dict[str, StoredTensor]) -> int:
    return sum(tensor.size for name, tensor in tensors.items() if name != "rope_freqs.weight")


def _plain_token_ids(path: Path, config: dict[str, Any]) -> NDArray[np.int64]:
    vocab_size: int = config["vocab_size"]
    if path.is_file():
        types = read_gguf_metadata(path).get("tokenizer.ggml.token_type", [])
        special = {token_id for token_id, kind in enumerate(types) if kind != GGUF_NORMAL_TOKEN}
    else:
        tokenizer = path / "tokenizer.json"
        added = (
            json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
            if tokenizer.exists()
            else []
        )
        special = {token["id"] for token in added}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value: Any = config.get(key)
        special |= set(value if isinstance(value, list) else [value])
    return np.array([i for i in range(vocab_size) if i not in special], dtype=np.int64)
