"""Log-probabilities in OpenAI's two forms."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from candle_llama.tokenizer import Tokenizer
from candle_llama.types import TokenLogprob

TokenText: TypeAlias = Callable[[int], str]

# OpenAI's number for what is impossible; JSON has no infinity.
_LEAST = -9999.0
_MAX_CACHED = 2**17
_REPLACEMENT = "\ufffd"


def token_texts(tokenizer: Tokenizer) -> TokenText:
    """Returns a function that gives the text of a token in the middle of a text."""
    # Some tokenizers drop the space at the beginning of a text, so the token stands behind another one.
    anchor = tokenizer.encode("a", add_special_tokens=False)
    before = tokenizer.decode(anchor, skip_special_tokens=False)

    @functools.lru_cache(_MAX_CACHED)
    def text(token_id: int) -> str:
        return tokenizer.decode([*anchor, token_id], skip_special_tokens=False).removeprefix(before)

    return text


def chat(entries: Sequence[TokenLogprob], text: TokenText) -> list[dict[str, Any]]:
    """Returns the form of chat completions."""
    return [
        {
            **_one(entry.token_id, entry.logprob, text),
            "top_logprobs": [_one(token_id, logprob, text) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]


def _one(token_id: int, logprob: float, text: TokenText) -> dict[str, Any]:
    token = text(token_id)
    # A token that holds a part of a character only has no text, and its bytes are not known here.
    known = None if _REPLACEMENT in token else list(token.encode())
    return {"token": token, "logprob": max(logprob, _LEAST), "bytes": known}


class Completions:
    """Makes the form of completions; `offset` is where the next token begins in the choice's text."""

    def __init__(self, text: TokenText) -> None:
        self._text = text
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
