"""Log-probabilities in OpenAI's two forms."""

import functools
from collections.abc import Sequence
from typing import Any

from candle_llama.tokenizer import Tokenizer
from candle_llama.types import TokenLogprob

# OpenAI's number for what is impossible; JSON has no infinity.
_LEAST = -9999.0
_MAX_CACHED = 2**17
_REPLACEMENT = "\ufffd"


class TokenTexts:
    """The texts and the bytes of tokens in the middle of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers drop the space at the beginning of a text, so the token stands behind another one.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)
        self._before = tokenizer.decode(self._anchor, skip_special_tokens=False)
        self.text = functools.lru_cache(_MAX_CACHED)(self._text)

    def _text(self, token_id: int) -> str:
        text = self._tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(self._before)

    def bytes(self, token_id: int) -> list[int] | None:
        """Returns a token's bytes, also of a part of a character; None if other tokens change them."""
        text = self.text(token_id)
        found = self._tokenizer._core.token_bytes(token_id)
        if found is None and _REPLACEMENT in text:
            return None
        # A special token adds no bytes to an answer, but has a name.
        return list(found or text.encode())


def chat(entries: Sequence[TokenLogprob], texts: TokenTexts) -> list[dict[str, Any]]:
    """Returns the form of chat completions."""
    return [
        {
            **_one(entry.token_id, entry.logprob, texts),
            "top_logprobs": [_one(token_id, logprob, texts) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]


def _one(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {
        "token": texts.text(token_id),
        "logprob": max(logprob, _LEAST),
        "bytes": texts.bytes(token_id),
    }


class Completions:
    """Makes the form of completions; `offset` is where the next token begins in the choice's text."""

    def __init__(self, texts: TokenTexts) -> None:
        self._text = texts.text
        self._offset = 0

    def add(
        self, entries: Sequence[tuple[int, float | None, Sequence[tuple[int, float]]]]
    ) -> dict[str, list[Any]]:
        """Returns the next tokens' form; each is token id, log-probability and the likeliest tokens."""
        form: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, logprob, top in entries:
            token = self._text(token_id)
            form["tokens"].append(token)
            form["text_offset"].append(self._offset)
            self._offset += len(token)
            if logprob is None:
                form["token_logprobs"].append(None)
                form["top_logprobs"].append(None)
                continue
            form["token_logprobs"].append(max(logprob, _LEAST))
            likeliest: dict[str, float] = {}
            # Of tokens with equal texts, the first is the likeliest. The chosen one is always there.
            for other, value in (*top, (token_id, logprob)):
                likeliest.setdefault(self._text(other), max(value, _LEAST))
            form["top_logprobs"].append(likeliest)
        return form

    def add_chosen(self, entries: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Returns the form of tokens that were generated."""
        return self.add([(entry.token_id, entry.logprob, entry.top) for entry in entries])
