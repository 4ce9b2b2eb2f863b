"""Rows of the model's vocabulary that the tokenizer has no token for."""

import pytest

import candle_llama
import tiny as checkpoints


def test_padding_rows_decode_to_empty_text(tmp_path):
    config = checkpoints.tiny_config(vocab_size=checkpoints.VOCAB_SIZE + 21)
    folder = checkpoints.write_checkpoint(tmp_path / "m", config)
    padding = checkpoints.VOCAB_SIZE + 5
    for tokenizer in (candle_llama.load(folder).tokenizer, candle_llama.load_tokenizer(folder)):
        assert tokenizer.decode([padding, checkpoints.TOKEN_IDS["a"]]) == "a"
        with pytest.raises(ValueError, match=f"below {checkpoints.VOCAB_SIZE + 21}"):
            tokenizer.decode([checkpoints.VOCAB_SIZE + 21])
