"""Malicious files are refused soon, with details, within bounded memory, and nothing else breaks."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama import CheckpointError, UnsupportedModelError

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
SOON = 10.0

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX FIFOs, links and limits")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return checkpoints.write_checkpoint(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of three shards that a test may damage."""
    return checkpoints.write_checkpoint(tmp_path / "model", shards=3)


@pytest.fixture(autouse=True)
def _soon_and_healthy(llm: candle_llama.Llama) -> Iterator[None]:
    """Checks that the test ends soon, and that another model still works afterwards."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SOON
    assert len(llm.generate("the", max_new_tokens=2, ignore_eos=True).token_ids) == 2


def refusal(
    path: Path,
    error: type[Exception] | tuple[type[Exception], ...] = CheckpointError,
    match: str | None = None,
) -> Any:
    """Returns the error that loading raises, whose message must have a reasonable length."""
    with pytest.raises(error, match=match) as caught:
        candle_llama.load(path)
    assert len(str(caught.value)) < 1000
    return caught.value


# Safetensors

Header = dict[str, Any]


def read_safetensors(path: Path) -> tuple[Header, bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write_raw(path: Path, header: str | bytes, data: bytes = b"") -> None:
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def change_header(folder: Path, change: Callable[[Header], object]) -> Path:
    header, data = read_safetensors(folder / "model.safetensors")
    change(header)
    write_raw(folder / "model.safetensors", json.dumps(header), data)
    return folder


WRONG_ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "begins beyond the file": ({"data_offsets": [2**62, 2**62 + 160]}, "truncated"),
    "ends beyond the file": ({"data_offsets": [0, 2**40], "shape": [2**38]}, "truncated"),
    "runs backwards": ({"data_offsets": [160, 0]}, "before it begins"),
    "offset beyond 64 bits": ({"data_offsets": [2**64, 2**64 + 160]}, "not valid"),
    "negative offset": ({"data_offsets": [-160, 0]}, "not valid"),
    "shape that needs more": ({"shape": [41]}, "takes 164 bytes"),
    "shape that overflows": ({"shape": [2**40, 2**40]}, "too large"),
    "negative dimension": ({"shape": [-40]}, "not valid"),
    "many dimensions": ({"shape": [1] * 5000}, "more than 8 dimensions"),
    "over another tensor": ({"data_offsets": [0, 160]}, "overlap"),
    "type of another kind": ({"dtype": 7}, "not valid"),
}


@pytest.mark.parametrize("name", WRONG_ENTRIES)
def test_a_tensor_with_a_wrong_entry(folder, name):
    change, reason = WRONG_ENTRIES[name]
    error = refusal(change_header(folder, lambda header: header[NORM].update(change)), match=reason)
    assert error.path == str(folder / "model.safetensors")


def test_a_gap_between_tensors(folder):
    refusal(change_header(folder, lambda header: header.pop(NORM)), match=r"gap|after its last tensor")


@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_integer_weights(folder, dtype):
    error = refusal(
        change_header(folder, lambda header: header[NORM].update(dtype=dtype)), UnsupportedModelError, dtype
    )
    assert (error.tensor, error.value) == (NORM, dtype)


@pytest.mark.parametrize("shape", [(), (0,), (40, 1), (1, 40)])
def test_norms_of_the_wrong_shape(folder, shape):
    tensors = checkpoints.tiny_tensors(checkpoints.tiny_config()) | {NORM: np.ones(shape, np.float32)}
    checkpoints.write_safetensors(folder / "model.safetensors", tensors)
    error = refusal(folder)
    assert (error.tensor, list(error.got), list(error.expected)) == (NORM, list(shape), [40])


HEADERS = {
    "nested": b'{"a":' + b"[" * 1_000_000,
    "nested metadata": b'{"__metadata__":' + b"[" * 1_000_000,
    "invalid UTF-8": b'{"\xff":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "no object": b"[]",
    "huge number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,0]}}',
    "long name": b'{"' + b"a" * 1_000_000 + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "long type": b'{"a":{"dtype":"' + b"F" * 1_000_000 + b'","shape":[0],"data_offsets":[0,0]}}',
    "twice": b"{" + b",".join([b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'] * 2) + b"}",
    "no tensor": b"{}",
}


@pytest.mark.parametrize("header", HEADERS)
def test_invalid_headers(folder, header):
    write_raw(folder / "model.safetensors", HEADERS[header])
    assert refusal(folder).path


# The index


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/../b", "a\\b"])
def test_an_index_cannot_name_files_elsewhere(sharded, name):
    checkpoints.write_safetensors(sharded.parent / "outside.safetensors", {NORM: np.ones(40, np.float32)})
    refusal(change_index(sharded, lambda names: names.update({NORM: name})), match="not a plain file name")


@needs_posix
def test_a_shard_may_be_a_link_out_of_the_folder(sharded):
    with candle_llama.load(sharded) as llm:
        expected = llm.logits([5, 77])
    shard = sharded / "model-00002-of-00003.safetensors"
    outside = shard.rename(sharded.parent / "outside")
    shard.symlink_to(outside)
    with candle_llama.load(sharded) as llm:
        assert np.array_equal(llm.logits([5, 77]), expected)


@needs_posix
def test_the_links_of_a_hub_cache_are_followed(sharded, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    blobs = snapshot.parent.parent / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    with candle_llama.load(snapshot) as model:
        assert model.load_report.lm_head == "tied"


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        candle_llama.load(sharded)
    assert caught.value.filename.endswith("model-00002-of-00003.safetensors")


def test_an_index_that_is_wrong_about_a_shard(sharded):
    first = "model-00001-of-00003.safetensors"
    refusal(
        change_index(sharded, lambda names: names.update({NORM: first})), match="which has no such tensor"
    )
    refusal(change_index(sharded, lambda names: names.update({NORM: 7})), match="expected a string")


def test_a_tensor_in_two_shards(sharded):
    for name in ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"):
        header, data = read_safetensors(sharded / name)
        header["stray"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        write_raw(sharded / name, json.dumps(header), data + b"\0\0\0\0")
    refusal(sharded, match="'stray'|\"stray\" is in two shards")


# Config

BAD_SIZES = [
    {key: value}
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    for value in (0, -1, 2**31, 2**64, 1.5, "64")
]
BAD_SHAPES: list[dict[str, Any]] = [
    {"num_key_value_heads": 3},
    {"num_attention_heads": 7},
    {"num_attention_heads": 2**24, "num_key_value_heads": 2**24, "head_dim": 2},
    {"head_dim": 2**24},
    {"head_dim": 5},
    {"head_dim": 0},
    {"rms_norm_eps": 0},
    {"rms_norm_eps": -1e-5},
    {"rms_norm_eps": 1e300},
    {"rope_theta": 0.0},
    {"rope_theta": -1.0},
    {"rope_theta": 1e300},
]


@pytest.mark.parametrize("changes", BAD_SIZES + BAD_SHAPES, ids=str)
def test_config_values_out_of_range(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    error = refusal(folder, (CheckpointError, UnsupportedModelError))
    named = {*changes, "num_attention_heads"}  # the error names it if head_dim makes the heads too wide
    assert any(key in str(error) for key in named) or error.tensor


def config_with(value: bytes) -> bytes:
    return json.dumps(checkpoints.tiny_config()).encode()[:-1] + b', "more": ' + value + b"}"


CONFIGS = {
    "empty": b"",
    "nested": config_with(b"[" * 100_000),
    "nested and closed": config_with(b"[" * 1000 + b"]" * 1000),
    "too long": config_with(b'"' + b"x" * (17 << 20) + b'"'),
    "too many values": config_with(b"[" + b"0," * 1_000_000 + b"0]"),
    "huge number": config_with(b"1e999"),
    "duplicate key": config_with(b'0, "vocab_size": 1'),
    "invalid UTF-8": config_with(b'"\xff"'),
    "long key": config_with(b'0, "' + b"k" * 100_000 + b'": 1'),
    "another model's name at length": config_with(
        b'0, "rope_parameters": {"rope_type": "%s"}' % (b"q" * 100_000)
    ),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_invalid_configs(folder, config):
    (folder / "config.json").write_bytes(CONFIGS[config])
    refusal(folder, (CheckpointError, UnsupportedModelError))


@pytest.mark.parametrize("text", [b"", b"[", b"[]", b'{"top_k": 1, "top_k": 2}', b'{"temperature": 1e999}'])
def test_invalid_generation_configs(folder, text):
    (folder / "generation_config.json").write_bytes(text)
    assert refusal(folder).path == str(folder / "generation_config.json")


# GGUF


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + raw


def array(key: str, kind: int, count: int, raw: bytes = b"") -> bytes:
    return value(key, 9, struct.pack("<IQ", kind, count) + raw)


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = value("general.architecture", 8, string("llama"))


def gguf(
    values: list[bytes],
    tensors: Sequence[bytes] = (),
    data: int = 0,
    version: int = 3,
    tensor_count: int | None = None,
) -> bytes:
    count = len(tensors) if tensor_count is None else tensor_count
    head = b"GGUF" + struct.pack("<IQQ", version, count, 1 + len(values))
    raw = head + ARCHITECTURE + b"".join(values) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32 + data)


GGUF_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "another magic": (b"GGML" + bytes(100), "GGUF"),
    "array of arrays": (gguf([array("x", 9, 1, bytes(16))]), "array of arrays"),
    "array of a billion": (gguf([array("x", 0, 10**9)]), "truncated"),
    "strings of a billion": (gguf([array("x", 8, 10**9)]), "truncated"),
    "string without end": (gguf([value("x", 8, struct.pack("<Q", 2**63))]), "truncated"),
    "unknown type of value": (gguf([value("x", 13, bytes(8))]), "unknown type 13"),
    "unknown type of elements": (gguf([array("x", 200, 1, bytes(8))]), "unknown type 200"),
    "boolean of 7": (gguf([value("x", 7, b"\7")]), "boolean 7"),
    "invalid UTF-8": (gguf([value("llama.x", 8, string(b"\xff"))]), "UTF-8"),
    "invalid UTF-8 in a key": (gguf([value(b"\xff", 0, b"\0")]), "UTF-8"),
    "key twice": (gguf([value("x", 0, b"\0")] * 2), "twice"),
    "key with an escape": (gguf([value("\x1b[2J", 0, b"\0")]), "control character"),
    "long key": (gguf([value("k" * 100_000, 0, b"\0")]), "the limit is 1024"),
    "tensor twice": (gguf([], [tensor("a", [1])] * 2, 4), "two tensors named"),
    "tensor count of 2^63": (gguf([], [tensor("a", [1])], 4, tensor_count=2**63), "truncated"),
    "dimensions of 2^40": (gguf([], [tensor("a", [2**40, 2**40])], 4), "too large"),
    "unknown type, huge": (gguf([], [tensor("a", [2**40], 99)], 4), "too large"),
    "ninety dimensions": (gguf([], [tensor("a", [1] * 90)], 4), "90 dimensions"),
    "beyond the file": (gguf([], [tensor("a", [1], offset=2**40)], 4), "truncated"),
    "offset that overflows": (gguf([], [tensor("a", [1], offset=2**64 - 32)], 4), "too large"),
    "overlap": (gguf([], [tensor("a", [16]), tensor("b", [8], offset=32)], 64), "overlap"),
    "unaligned": (gguf([], [tensor("a", [1], offset=4)], 64), "no multiple of 32"),
    **{
        f"alignment {number}": (
            gguf([value("general.alignment", 4, struct.pack("<I", number))]),
            "power of two",
        )
        for number in (0, 3, 48, 2**31)
    },
    "alignment of text": (gguf([value("general.alignment", 8, string("32"))]), "an integer"),
}


@pytest.mark.parametrize("name", GGUF_FILES)
def test_invalid_gguf_files(tmp_path, name):
    raw, reason = GGUF_FILES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    assert refusal(path, match=reason).path == str(path)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (gguf([], version=1), "GGUF version"),
        (gguf([], version=4), "GGUF version"),
        (gguf([], version=3 << 24), "GGUF byte order"),
        (gguf([]).replace(b"llama", b"mamba"), "general.architecture"),
    ],
)
def test_unsupported_gguf_files(tmp_path, raw, key):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    assert refusal(path, UnsupportedModelError).key == key


def test_truncated_gguf_files(tmp_path):
    whole = checkpoints.write_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 6000, 97), *range(6000, len(whole), 4099)]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            candle_llama.load(path)
        assert (caught.value.path, caught.value.got) == (str(path), length)
        assert caught.value.expected > length


# Paths that are no regular files


def put_folder(path: Path) -> None:
    path.mkdir()


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_socket(path: Path) -> None:
    # A socket's path must be short, and pytest's folders have long ones: bind a relative path.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


@needs_posix
@pytest.mark.parametrize("put", [put_folder, put_fifo, put_device, put_socket])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", INDEX])
def test_a_path_that_is_no_regular_file_is_refused_without_waiting(folder, put, name):
    if name == INDEX:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / name).unlink(missing_ok=True)
    put(folder / name)
    assert refusal(folder, match="not a regular file").path == str(folder / name)


@needs_posix
@pytest.mark.parametrize("put", [put_fifo, put_device, put_socket])
def test_a_gguf_path_that_is_no_regular_file(tmp_path, put):
    path = tmp_path / "model.gguf"
    put(path)
    refusal(path, match="not a regular file")


@needs_posix
@pytest.mark.parametrize("put", [put_folder, put_fifo, put_device])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
)
def test_a_model_whose_tokenizer_is_no_file_works_with_ids(folder, put, name):
    if name == "special_tokens_map.json":
        (folder / "tokenizer_config.json").unlink()
    (folder / name).unlink(missing_ok=True)
    put(folder / name)
    with candle_llama.load(folder) as model:
        assert model.generate([1, 2], max_new_tokens=2, ignore_eos=True).token_ids
        with pytest.raises(CheckpointError, match="not a regular file"):
            model.generate("text")


# Files that change while they are in use


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be cut there")
@pytest.mark.parametrize("write", [checkpoints.write_checkpoint, checkpoints.write_gguf])
def test_a_file_that_shrinks_while_loaded_is_an_error_and_no_signal(tmp_path, write):
    path = write(tmp_path / "model.gguf")
    file = path / "model.safetensors" if path.is_dir() else path
    length = file.stat().st_size
    with candle_llama.load(path) as model:
        # More tokens than wait for a reader, so that the stream cannot have ended.
        stream = model.stream([1, 2], max_new_tokens=200, ignore_eos=True)
        next(stream)
        # The next pass may run already, and the system ends a process that reads what is gone.
        busy = -1.0
        while busy != (busy := model.metrics().busy_seconds):
            time.sleep(0.05)
        os.truncate(file, 100)
        for attempt in (lambda: model.generate([1, 2]), lambda: model.logits([1, 2]), lambda: list(stream)):
            with pytest.raises(CheckpointError, match="truncated") as caught:
                attempt()
            assert (caught.value.path, caught.value.got) == (str(file), 100)
            assert caught.value.expected == length


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be removed there")
def test_a_file_that_is_replaced_or_removed_while_loaded_stays_readable(folder):
    file = folder / "model.safetensors"
    with candle_llama.load(folder) as model:
        before = model.logits([1, 2])
        (folder / "other").write_bytes(b"short")
        (folder / "other").replace(file)
        np.testing.assert_array_equal(model.logits([1, 2]), before)
        file.unlink()
        np.testing.assert_array_equal(model.logits([1, 2]), before)


# Memory


def sparse(path: Path, start: bytes, length: int) -> None:
    path.write_bytes(start)
    os.truncate(path, length)


def tensors_without_end(folder: Path) -> None:
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    write_raw(folder / "model.safetensors", "{" + ",".join(entry % i for i in range(1_500_000)) + "}")


def shape_without_end(folder: Path) -> None:
    start = '{"a":{"dtype":"F32","shape":[0'
    write_raw(folder / "model.safetensors", start + ",0" * 45_000_000 + '],"data_offsets":[0,0]}}')


def name_without_end(folder: Path) -> None:
    write_raw(folder / "model.safetensors", '{"' + "a" * 90_000_000 + '":0}')


def config_of_zeros(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"a":[0' + b",0" * 8_000_000 + b"]}")


def config_of_empty_objects(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"a":[{}' + b",{}" * 5_000_000 + b"]}")


def index_without_end(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(300_000)}})
    )


def gguf_in(folder: Path, raw: bytes, length: int) -> None:
    for file in folder.iterdir():
        file.unlink()
    sparse(folder / "model.gguf", raw, length)


def gguf_strings_without_end(folder: Path) -> None:
    gguf_in(folder, gguf([array("x", 8, 10**9)]), 10**10)


def gguf_empty_strings(folder: Path) -> None:
    names = ["a", "b", "c", "d"]
    gguf_in(folder, gguf([array(name, 8, 1 << 22, bytes(8 << 22)) for name in names]), 10**10)


def gguf_bytes_without_end(folder: Path) -> None:
    gguf_in(folder, gguf([array("tokenizer.ggml.token_type", 0, 10**9)]), 10**10)


def gguf_tensors_without_end(folder: Path) -> None:
    gguf_in(folder, gguf([], tensor_count=10**8), 10**10)


def gguf_values_without_end(folder: Path) -> None:
    raw = gguf([])
    gguf_in(folder, raw[:16] + struct.pack("<Q", 10**8) + raw[24:], 10**10)


BOMBS = [
    tensors_without_end,
    shape_without_end,
    name_without_end,
    config_of_zeros,
    config_of_empty_objects,
    index_without_end,
    gguf_strings_without_end,
    gguf_empty_strings,
    gguf_bytes_without_end,
    gguf_tensors_without_end,
    gguf_values_without_end,
]

# Loads a path with at most 512 MiB of private memory, beyond that of the imports. A failed allocation ends
# the process; memory-mapped files do not count.
LIMITED = """
import re, resource, sys
import candle_llama
status = open("/proc/self/status").read()
held = int(re.search(r"VmData:\\s*(\\d+) kB", status)[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + (512 << 20),) * 2)
try:
    candle_llama.load(sys.argv[1])
except (candle_llama.CheckpointError, FileNotFoundError) as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits and /proc")
@pytest.mark.parametrize("write", BOMBS, ids=lambda write: write.__name__)
def test_memory_stays_within_bounds(folder, write):
    write(folder)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("CheckpointError", "FileNotFoundError")
