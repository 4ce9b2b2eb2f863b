"""Which tokens end a text: those that a folder's files name, and those that GGUF vocabularies show."""

import json

import pytest

import candle_llama
import tiny

PAD = tiny.TOKEN_IDS["<|pad|>"]
START = tiny.TOKEN_IDS["<|im_start|>"]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ends(llm, token_id):
    out = llm.generate("hello", logit_bias={token_id: 1000.0}, max_new_tokens=3)
    return out.finish_reason == "stop" and out.text == ""


def test_all_end_tokens_that_the_files_of_a_folder_name_end_a_text(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", tiny.tiny_config(eos_token_id=[PAD, 7]))
    edit(folder / "generation_config.json", eos_token_id=tiny.END_OF_TURN)
    edit(folder / "tokenizer_config.json", eos_token="<|end|>")
    with candle_llama.load(folder) as llm:
        assert all(ends(llm, token) for token in (PAD, tiny.END_OF_TURN, tiny.EOS))
        # config.json's 7 is ordinary text.
        assert not ends(llm, 7)
        notes = [note for note in llm.load_report.notes if "end token" in note]
        assert [int(note.split()[3]) for note in notes] == [PAD, 7, tiny.EOS]
        assert "ignored" in notes[1]
        assert "ends a text too" in notes[2]


def test_files_that_agree_need_no_note(llm):
    assert not [note for note in llm.load_report.notes if "end token" in note]


@pytest.mark.parametrize("types", ["control", "normal"])
def test_a_gguf_file_that_names_one_end_token_ends_at_the_others_by_their_text(tmp_path, monkeypatch, types):
    # llama.cpp's list has the tiny vocabulary's <|end|> and <|im_end|>. The file names neither.
    end, end_of_turn = tiny.EOS, tiny.END_OF_TURN
    monkeypatch.setattr(tiny, "EOS", START)
    monkeypatch.setattr(tiny, "END_OF_TURN", START)
    if types == "normal":
        monkeypatch.setattr(tiny, "SPECIAL_TOKENS", ["<|begin|>", "<|im_start|>", "<|pad|>"])
    with candle_llama.load(tiny.write_gguf(tmp_path / "tiny.gguf")) as llm:
        assert all(ends(llm, token) for token in (START, end, end_of_turn))
        assert not ends(llm, PAD)


@pytest.mark.parametrize("text", ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"])
def test_the_tokens_that_follow_filled_in_code_end_a_text(tmp_path, monkeypatch, text):
    monkeypatch.setattr(tiny, "VOCABULARY", [text if t == "<|pad|>" else t for t in tiny.VOCABULARY])
    with candle_llama.load(tiny.write_gguf(tmp_path / "tiny.gguf")) as llm:
        assert ends(llm, PAD)
