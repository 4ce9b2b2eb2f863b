"""Writes the seeds in corpus/: tiny valid files, made by the tests' helpers.

Run with the test environment's Python: .venv/bin/python fuzz/make_corpus.py
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "python"))

import tiny  # noqa: E402

SMALL = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1}


def seed(target: str, name: str, content: bytes) -> None:
    """Writes one seed."""
    folder = ROOT / "fuzz" / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def safetensors(work: Path) -> None:
    """Two whole files, and one header alone."""
    config = tiny.tiny_config(**SMALL, num_hidden_layers=1, vocab_size=5)
    for dtype in ("float32", "bfloat16"):
        path = tiny.write_checkpoint(work / dtype, config, dtype=dtype, tokenizer=False) / "model.safetensors"
        seed("safetensors", dtype, path.read_bytes())
    header = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"dtype": "F16", "shape": [2, 8], "data_offsets": [0, 32]},
        "lm_head.weight": {"dtype": "I8", "shape": [32], "data_offsets": [32, 64]},
    }
    seed("safetensors", "header", json.dumps(header, separators=(",", ":")).encode())


def gguf(work: Path) -> None:
    """A whole model, a vocabulary, and one part of a model split in two."""
    config = tiny.gguf_config(**SMALL | {"hidden_size": 32, "intermediate_size": 32}, num_hidden_layers=1)
    vocabulary = tiny.write_gguf(work / "vocabulary.gguf", config, vocabulary_only=True).read_bytes()
    seed("gguf", "vocabulary", vocabulary)
    config = config | {"vocab_size": 8}
    whole = tiny.write_gguf(work / "whole.gguf", config, matrix_type="Q4_0", embedding_type="Q8_0")
    seed("gguf", "whole", whole.read_bytes())
    tiny.write_gguf(
        work / "parts.gguf", config, matrix_type="Q4_0", embedding_type="Q8_0", split_max_tensors=6
    )
    seed("gguf", "part", (work / "parts-00002-of-00002.gguf").read_bytes())


def config() -> None:
    """config.json in both spellings, generation_config.json and an index."""
    seed("config", "v4", json.dumps(tiny.tiny_config(rope_scaling=tiny.LLAMA3_ROPE)).encode())
    seed("config", "v5", json.dumps(tiny.tiny_config_v5()).encode())
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "eos_token_id": [1, 2]}
    seed("config", "generation", json.dumps(generation).encode())
    index = {"metadata": {"total_size": 4}, "weight_map": {"lm_head.weight": "shard"}}
    seed("config", "index", json.dumps(index).encode())


def tokenizer() -> None:
    """A byte-level tokenizer, and a Unigram one with every kind of component."""
    seed("tokenizer", "byte_level", json.dumps(tiny.tokenizer_json()).encode())
    replace = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    # A character map with an empty table and one replacement.
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABhAA=="}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    unigram = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [charsmap, {"type": "NFKC"}, replace]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [metaspace, {"type": "Punctuation"}]},
        "post_processor": tiny.tokenizer_json()["post_processor"],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, metaspace]},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["l", -1.0], ["ll", -0.5]]},
    }
    seed("tokenizer", "unigram", json.dumps(unigram).encode())


def main() -> None:
    """Writes all seeds."""
    with tempfile.TemporaryDirectory() as work:
        safetensors(Path(work))
        gguf(Path(work))
    config()
    tokenizer()


if __name__ == "__main__":
    main()
