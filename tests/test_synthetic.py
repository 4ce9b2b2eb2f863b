"""Synthetic checkpoints: the right shapes, complete or absent, and readable by other libraries."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

import candle_llama
from candle_llama.bench import synthetic
from candle_llama.bench.numpy_llama import NumpyLlama
from candle_llama.bench.read_checkpoint import read_checkpoint
from candle_llama.bench.shapes import SHAPES, Shape
from candle_llama.bench.subject import Subject
from candle_llama.bench.synthetic import write_synthetic

SMALL = Shape(
    "small",
    ("s",),
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 400,
        "bos_token_id": 1,
        "eos_token_id": 398,
    },
    {1: "<|begin|>", 398: "<|end|>"},
)


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SHAPES", (*SHAPES, SMALL))
    # Smaller than a matrix, so that matrices wrap around the block; shards of a few tensors.
    monkeypatch.setattr(synthetic, "BLOCK_LEN", 4093)
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 80_000)


@pytest.mark.parametrize(
    ("name", "parameters", "head_dim", "rope_factor"),
    [
        # Counts as the models' authors give them: 1.23, 3.21 and 8.03 billion, 135 million.
        ("llama-3.2-1b", 1_235_814_400, 64, 32.0),
        ("llama-3.2-3b", 3_212_749_824, 128, 32.0),
        ("llama-3.1-8b", 8_030_261_248, 128, 8.0),
        ("smollm2-135m", 134_515_008, 64, None),
    ],
)
def test_shapes_are_those_of_the_real_models(
    name: str, parameters: int, head_dim: int, rope_factor: float | None
) -> None:
    shape = next(shape for shape in SHAPES if shape.name == name)
    assert shape.parameters == parameters
    assert shape.config["hidden_size"] // shape.config["num_attention_heads"] == head_dim
    scaling = shape.config["rope_scaling"]
    assert (scaling and scaling["factor"]) == rope_factor
    assert ("lm_head.weight" in shape.tensors()) == (name == "llama-3.1-8b")


def test_weights_are_random_and_of_a_sensible_size(tmp_path: Path) -> None:
    folder = write_synthetic("small", cache_dir=tmp_path)
    assert folder == tmp_path / "small"
    config, tensors = read_checkpoint(folder)
    assert config == SMALL.config
    assert {name: values.shape for name, values in tensors.items()} == SMALL.tensors()
    for name, values in tensors.items():
        if values.ndim == 1:
            assert (values == 1.0).all(), name
        else:
            # With 8,000 samples and more, the deviation is known to one percent.
            assert values.std() == pytest.approx(1 / math.sqrt(values.shape[1]), rel=0.05), name
            assert len(np.unique(values, axis=0)) == len(values), f"{name} repeats a row"
    matrices = [values for values in tensors.values() if values.shape == (64, 64)]
    assert not any(np.array_equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])
    logits = NumpyLlama(config, tensors).forward(list(range(50)))
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    folder = write_synthetic("s", cache_dir=tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="np") as shard:
            names += shard.keys()
            assert all(index["weight_map"][name] == file.name for name in shard.keys())  # noqa: SIM118
        assert file.stat().st_size < 80_000 + 5_000
    assert sorted(names) == sorted(SMALL.tensors())
    assert index["metadata"]["total_size"] == 2 * SMALL.parameters


def test_one_shard_needs_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 10**9)
    folder = write_synthetic("small", cache_dir=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_tokenizer_reads_any_text_with_the_models_ids(tmp_path: Path) -> None:
    folder = write_synthetic("small", cache_dir=tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id("<|begin|>") == 1
    assert tokenizer.token_to_id("<|end|>") == 398
    text = "naïve 😀\n" + "".join(map(chr, range(1, 128)))
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|begin|>", "<|end|>")


def test_a_complete_checkpoint_is_kept_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = write_synthetic("small", cache_dir=tmp_path, note=notes.append)
    shard = next(folder.glob("*.safetensors"))
    written = shard.read_bytes()
    assert len(notes) == 1
    assert write_synthetic("small", cache_dir=tmp_path, note=notes.append) == folder
    assert len(notes) == 1
    for damage in (lambda: shard.write_bytes(written[:-1]), shard.unlink, (folder / "config.json").unlink):
        damage()
        write_synthetic("small", cache_dir=tmp_path, note=notes.append)
        assert shard.read_bytes() == written, "the same weights every time"
    assert len(notes) == 4


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(synthetic, "_tokenizer", full_disk)
    with pytest.raises(OSError, match="full"):
        write_synthetic("small", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead = tmp_path / f".small-{process.pid}-abc"
    alive = tmp_path / f".small-{os.getpid()}-abc"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    write_synthetic("small", cache_dir=tmp_path)
    assert not dead.exists()
    assert alive.exists()


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000_000))
    with pytest.raises(OSError, match=r"small needs 0\.0 GB and 1 GB to spare, 1\.0 GB are free") as caught:
        write_synthetic("small", cache_dir=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert write_synthetic("small") == tmp_path / "candle-llama" / "synthetic" / "small"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert synthetic.default_cache_dir() == Path.home() / ".cache" / "candle-llama" / "synthetic"


def test_an_unknown_shape_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shape 'llama-9'.*llama-3\.2-1b"):
        write_synthetic("llama-9", cache_dir=tmp_path)


def test_a_type_gives_a_gguf_file_that_is_kept(tmp_path: Path) -> None:
    notes: list[str] = []
    path = write_synthetic("s:q4_0", cache_dir=tmp_path, note=notes.append)
    assert path == tmp_path / "small-Q4_0.gguf"
    assert len(notes) == 2
    folder = candle_llama.load_tokenizer(tmp_path / "small")
    # The file does not need the folder.
    shutil.rmtree(tmp_path / "small")
    assert write_synthetic("small:Q4_0", cache_dir=tmp_path, note=notes.append) == path
    assert len(notes) == 2
    with candle_llama.load(path) as llm:
        assert set(llm.load_report.storage) == {"F32", "Q4_0"}
        assert llm.tokenizer.encode("Hello, wörld") == folder.encode("Hello, wörld")
        assert len(llm.generate("a", max_new_tokens=3, ignore_eos=True).token_ids) == 3
    subject = Subject.open(path)
    assert (subject.parameters, subject.storage_type) == (SMALL.parameters, "Q4_0")


@pytest.mark.parametrize("gguf_type", synthetic.GGUF_TYPES)
def test_every_type_can_be_written(tmp_path: Path, gguf_type: str) -> None:
    notes: list[str] = []
    for _ in range(2):
        path = write_synthetic(f"small:{gguf_type}", cache_dir=tmp_path, note=notes.append)
        assert path == tmp_path / f"small-{gguf_type}.gguf"
    assert len(notes) == 2, "the second call finds the file"
    with candle_llama.load(path) as llm:
        assert llm.logits([1, 2]).shape[-1] == llm.config.vocab_size


def test_a_damaged_gguf_file_is_replaced(tmp_path: Path) -> None:
    path = write_synthetic("small:Q8_0", cache_dir=tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert write_synthetic("small:Q8_0", cache_dir=tmp_path).read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["small", "small-Q8_0.gguf"]


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no type 'q9'"):
        write_synthetic("small:q9", cache_dir=tmp_path)
