"""Models in several GGUF files, as the gguf package writes them."""

from pathlib import Path

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama import CheckpointError

IDS = [5, 6, 7, 8]


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The tiny model in parts of eight tensors."""
    checkpoints.write_gguf(tmp_path / "tiny.gguf", split_max_tensors=8)
    return sorted(tmp_path.glob("tiny-*.gguf"))


def test_any_part_gives_the_whole_model(parts, tmp_path):
    whole = checkpoints.write_gguf(tmp_path / "whole.gguf")
    assert [part.name for part in parts] == [f"tiny-{no:05}-of-00003.gguf" for no in (1, 2, 3)]
    with candle_llama.load(whole) as model:
        logits, bytes_, text = model.logits(IDS), model.load_report.bytes, model.tokenizer.encode("the world")
    for part in parts:
        with candle_llama.load(part) as model:
            np.testing.assert_array_equal(model.logits(IDS), logits)
            assert model.load_report.bytes == bytes_
            assert model.tokenizer.encode("the world") == text
        assert candle_llama.load_tokenizer(part).encode("the world") == text


def test_a_folder_of_parts_is_one_model(parts):
    with candle_llama.load(parts[0].parent) as model:
        assert model.logits(IDS).shape == (len(IDS), checkpoints.VOCAB_SIZE)


def test_inspect_counts_all_parts(parts, tmp_path, command):
    import json

    whole = checkpoints.write_gguf(tmp_path / "whole.gguf")
    expected = json.loads(command("inspect", whole, "--json").stdout)
    printed = json.loads(command("inspect", parts[0], "--json").stdout)
    assert printed.pop("path") == str(parts[0])
    expected.pop("path")
    assert printed == expected


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match="part 2 of 3") as caught:
        candle_llama.load(parts[0])
    assert caught.value.filename == str(parts[1])


def test_a_part_that_belongs_to_another_model(parts, tmp_path):
    other = checkpoints.write_gguf(tmp_path / "other.gguf", split_max_tensors=4)
    assert not other.exists()
    (tmp_path / "other-00002-of-00005.gguf").replace(parts[1])
    with pytest.raises(CheckpointError, match=r"split\.count is 5, expected 3") as caught:
        candle_llama.load(parts[0])
    assert caught.value.path == str(parts[1])


def test_metadata_of_every_type_is_accepted(tmp_path):
    import gguf

    path = checkpoints.write_gguf(tmp_path / "plain.gguf")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "rich.gguf", "llama")
    for name, value in [
        ("uint8", 1),
        ("int8", -1),
        ("uint16", 1),
        ("int16", -1),
        ("uint32", 1),
        ("int32", -1),
    ]:
        getattr(writer, f"add_{name}")(f"test.{name}", value)
    writer.add_uint64("test.uint64", 2**63)
    writer.add_int64("test.int64", -(2**63))
    writer.add_float32("test.float32", 0.5)
    writer.add_float64("test.float64", 0.5)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "é")
    for name, values in [
        ("ints", [1, 2]),
        ("floats", [0.5]),
        ("bools", [True, False]),
        ("strings", ["a", ""]),
    ]:
        writer.add_array(f"test.{name}", values)
    writer.add_array("test.bytes", b"\0\xff")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with candle_llama.load(path) as plain, candle_llama.load(tmp_path / "rich.gguf") as rich:
        np.testing.assert_array_equal(plain.logits(IDS), rich.logits(IDS))
        assert rich.load_report.warnings == []
