"""Texts from files cannot control the terminal that shows them."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama.cli import output

CONTROLS = "\x1b]0;title\x07\x9b31m\u202eab\u2066"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a tensor of a malicious name that no Llama has."""
    folder = checkpoints.write_checkpoint(tmp_path / "model", tokenizer=False)
    config = checkpoints.tiny_config()
    tensors = {**checkpoints.tiny_tensors(config), "title\u202eab\u2066": np.zeros(1, np.float32)}
    checkpoints.write_safetensors(folder / "model.safetensors", tensors)
    return folder


def test_messages_have_no_control_characters(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with candle_llama.load(folder) as llm:
            messages = [*llm.load_report.warnings, *llm.load_report.notes]
    with pytest.raises(candle_llama.CheckpointError) as refused:
        candle_llama.load(folder, strict=True)
    checkpoints.write_checkpoint(folder, checkpoints.tiny_config(hidden_act=CONTROLS), tokenizer=False)
    with pytest.raises(candle_llama.UnsupportedModelError) as unknown:
        candle_llama.load(folder)
    messages += [str(warning.message) for warning in caught]
    messages += [str(refused.value), str(unknown.value)]
    assert any("title" in message for message in messages)
    assert not any(character in message for message in messages for character in "\x1b\x07\x9b\u202e\u2066")


def test_a_terminal_gets_escapes_and_a_file_the_text_itself(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdout, expected in (
        (Terminal(), "a\n\tb\\u001b]0;title\\u0007\\u009b31m\\u202eab\\u2066"),
        (io.StringIO(), "a\n\tb" + CONTROLS),
    ):
        monkeypatch.setattr("sys.stdout", stdout)
        output.write("a\n\tb" + CONTROLS)
        assert stdout.getvalue() == expected


def test_tables_have_no_control_characters():
    assert output.table([("name" + CONTROLS, CONTROLS)]).isprintable()
