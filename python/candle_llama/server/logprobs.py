"""Log-probabilities in OpenAI's two forms."""

import codecs
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from candle_llama.tokenizer import Tokenizer
from candle_llama.types import TokenLogprob

# OpenAI's number for what is impossible; JSON has no infinity.
_LEAST = -9999.0
_MAX_CACHED = 2**17
_REPLACEMENT = "\ufffd"

_Entry: TypeAlias = tuple[int, float | None, Sequence[tuple[int, float]]]
"""A token id, its log-probability, and the likeliest tokens at its place."""


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

    def added(self, token_id: int) -> bytes | None:
        """Returns the bytes that a token adds to an answer; None if other tokens change them."""
        return self._tokenizer._core.token_bytes(token_id)

    def bytes(self, token_id: int) -> list[int] | None:
        """Returns a token's bytes, also of a part of a character; None if other tokens change them."""
        text = self.text(token_id)
        found = self.added(token_id)
        if found is None and _REPLACEMENT in text:
            return None
        # A special token adds no bytes to an answer, but has a name.
        return list(found or text.encode())

    def loses_space(self, token_id: int) -> bool:
        """Whether a token's first space is dropped at the beginning of a text."""
        first = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self.text(token_id).startswith(" ") and not first.startswith(" ")


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
    """Makes the form of completions; `offset` is where the next token begins in the choice's text.

    All tokens of one character have the same offset. A special token has no length, except in an echoed
    prompt whose text shows it.

    Args:
        texts: The texts of tokens.
        prompt: The token ids before the answer.
    """

    def __init__(self, texts: TokenTexts, prompt: Sequence[int]) -> None:
        self._texts = texts
        self._text = texts.text
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Some tokenizers drop the space at the beginning of a text: of the prompt, or of an answer that no
        # text precedes.
        self._prompt_is_empty = all(texts.added(token_id) == b"" for token_id in prompt)
        self._is_first = self._prompt_is_empty

    def add_echoed(self, entries: Sequence[_Entry], text: str) -> dict[str, list[Any]]:
        """Returns the form of the prompt's tokens; `text` is the prompt as the choice shows it."""
        self._is_first = True
        form = self._form(entries, lambda token_id: self._place_in(text, token_id))
        self._is_first = self._prompt_is_empty
        # The answer begins behind the prompt, also where a tokenizer changes the prompt's characters.
        self._decoder.reset()
        self._offset = len(text)
        return form

    def add_chosen(self, entries: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Returns the form of tokens that were generated."""
        return self._form([(entry.token_id, entry.logprob, entry.top) for entry in entries], self._place)

    def _place(self, token_id: int) -> int:
        """Returns where a token of the answer begins, and moves behind it."""
        added = self._texts.added(token_id)
        begin, piece = self._decoded(self._text(token_id).encode() if added is None else added)
        self._offset = begin + len(self._visible(piece, token_id))
        return begin

    def _place_in(self, text: str, token_id: int) -> int:
        """As `_place`, for a token of the echoed prompt."""
        added = self._texts.added(token_id)
        begin, piece = self._decoded(added or self._text(token_id).encode())
        if added == b"" and not text.startswith(piece, begin):
            # The tokenizer has put it before the text.
            piece = ""
        piece = self._visible(piece, token_id)
        if not text.startswith(piece, begin):
            # Some tokenizers put a space behind each special token of the text too.
            piece = piece.removeprefix(" ")
        self._offset = min(begin + len(piece), len(text))
        return begin

    def _visible(self, piece: str, token_id: int) -> str:
        if not piece or not self._is_first:
            return piece
        self._is_first = False
        return piece[1:] if self._texts.loses_space(token_id) else piece

    def _decoded(self, data: bytes) -> tuple[int, str]:
        """Returns where a token's text begins, and the characters that it completes."""
        is_inside = not data or 0x80 <= data[0] < 0xC0
        # What does not go on with the last character ends it: that character is broken.
        broken = "" if is_inside else self._decoder.decode(b"", True)
        return self._offset + len(broken), self._decoder.decode(data)

    def _form(self, entries: Sequence[_Entry], place: Callable[[int], int]) -> dict[str, list[Any]]:
        """Returns the next tokens' form; `place` returns a token's offset."""
        form: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, logprob, top in entries:
            token = self._text(token_id)
            form["tokens"].append(token)
            form["text_offset"].append(place(token_id))
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
