"""The keywords of `apply_chat_template`."""

import pytest

USER = {"role": "user", "content": "Capital of France?"}
BEGUN = {"role": "assistant", "content": "The capital "}
OPENED = "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n"


def test_the_final_message_can_be_continued(tokenizer):
    text = tokenizer.apply_chat_template([USER, BEGUN], continue_final_message=True)
    assert text == OPENED + "The capital "
    parts = {
        "role": "assistant",
        "content": [{"type": "text", "text": "The"}, {"type": "text", "text": " end"}],
    }
    joined = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}/{% endfor %}"
    done = tokenizer.apply_chat_template([parts], chat_template=joined, continue_final_message=True)
    assert done == "The end"
    # A template that trims messages: nothing follows the text.
    trimmed = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    done = tokenizer.apply_chat_template([USER, BEGUN], chat_template=trimmed, continue_final_message=True)
    assert done == "[Capital of France?][The capital"
    assert BEGUN == {"role": "assistant", "content": "The capital "}


def test_a_final_message_that_cannot_be_continued_is_refused(tokenizer):
    with pytest.raises(ValueError, match="exclude each other"):
        tokenizer.apply_chat_template([USER], add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ValueError, match="does not write the last message"):
        tokenizer.apply_chat_template([USER], chat_template="{{ 1 }}", continue_final_message=True)
    with pytest.raises(ValueError, match="no text to continue"):
        tokenizer.apply_chat_template(
            [{"role": "assistant"}], chat_template="{{ 1 }}", continue_final_message=True
        )


def test_tokenize_gives_the_ids(tokenizer):
    ids = tokenizer.apply_chat_template([USER], tokenize=True)
    assert ids == tokenizer.encode(OPENED, add_special_tokens=False)
    assert tokenizer.apply_chat_template([USER], tokenize=False) == OPENED


def test_a_variable_that_the_template_never_reads_is_a_warning(tokenizer, llm):
    with pytest.warns(UserWarning, match="never reads 'return_tensors', 'thinking'"):
        text = tokenizer.apply_chat_template([USER], return_tensors="pt", thinking=False)
    assert text == OPENED
    with pytest.warns(UserWarning, match="never reads 'thinking'"):
        llm.chat([USER], template_variables={"thinking": True}, max_new_tokens=1)
    read = "{% if thinking is defined %}{{ messages[0].content }}{% endif %}"
    assert tokenizer.apply_chat_template([USER], chat_template=read, thinking=1) == USER["content"]
