"""Chat templates that are chosen by their names."""

import shutil

import pytest

import candle_llama

USER = {"role": "user", "content": "Capital of France?"}


@pytest.fixture
def named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("default {{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use", "x.y"):
        text = name + " {{ messages[0].content }}"
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    (folder / "additional_chat_templates" / "README.md").write_text("not a template")
    return candle_llama.load_tokenizer(folder)


@pytest.mark.parametrize("name", ["default", "rag", "tool_use", "x.y"])
def test_a_template_is_chosen_by_its_name(named, name):
    assert named.apply_chat_template([USER], chat_template=name) == f"{name} Capital of France?"
    assert named.apply_chat_template([USER]) == "default Capital of France?"
    assert named.apply_chat_template([USER], tools=[]) == "tool_use Capital of France?"


@pytest.mark.parametrize("name", ["ragg", "", "README", "Rag"])
def test_an_unknown_name_is_an_error(named, llm, name):
    with pytest.raises(ValueError, match=r"nor the name of one; the names are default, rag, tool_use, x\.y"):
        named.apply_chat_template([USER], chat_template=name)
    with pytest.raises(ValueError, match="neither a template nor the name of one"):
        llm.chat([USER], chat_template=name)


def test_additional_templates_join_those_of_the_config(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag {{ messages[0].content }}")
    tokenizer = candle_llama.load_tokenizer(folder)
    assert (
        tokenizer.apply_chat_template([USER])
        == "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template([USER], chat_template="rag") == "rag Capital of France?"
