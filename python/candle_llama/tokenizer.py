"""Text to token ids and back, and chat templates."""

import os
import warnings
from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, Literal, Self, Unpack, overload

import numpy as np

from candle_llama import _core, hub
from candle_llama.chat_template import ChatTemplate, forms, plain, with_reasoning
from candle_llama.options import SOURCE, SourceOptions, check_bool, check_text, keywords, pick, shown
from candle_llama.types import Message


class Tokenizer:
    """A model's tokenizer; from `load_tokenizer`, or `Llama.tokenizer`.

    Attributes:
        vocab_size: Number of tokens.
        bos_token_id: The token that begins a text, if the model has one.
        eos_token_id: The token that ends a text, if the model has one.
        chat_template: The model's Jinja template, if it has one.
        kind: Where it comes from, such as "tokenizer.json".
    """

    def __new__(cls, *args: object, **_: object) -> Self:
        """Refuses what other packages take, such as a path; `load_tokenizer` makes a tokenizer."""
        if not args or not isinstance(args[0], _core.Tokenizer):
            raise TypeError(
                "Tokenizer(...) does not load a tokenizer: use candle_llama.load_tokenizer(source)"
            )
        return super().__new__(cls)

    def __init__(self, core: _core.Tokenizer, source: str, options: Mapping[str, Any]) -> None:
        self._core = core
        self._source = source
        self._options = dict(options)
        self.vocab_size: int = core.vocab_size
        self.bos_token_id: int | None = core.bos_token_id
        self.eos_token_id: int | None = core.eos_token_id
        self.chat_template: str | None = core.chat_template
        self.kind: str = core.kind
        # Few templates have more than two names.
        self._compiled = lru_cache(maxsize=8)(ChatTemplate)

    def __repr__(self) -> str:
        return f"<Tokenizer of {self._source}: {self.kind}, {self.vocab_size} tokens>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reload, (self._source, self._options)

    def __copy__(self) -> Self:
        return self  # Nothing in it changes.

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def encode(
        self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        """Converts text to token ids.

        Args:
            text: Any text.
            add_special_tokens: Add BOS, or other tokens, as the tokenizer's config says.
            split_special_tokens: Treat the names of special tokens in `text` as plain text.

        Returns:
            Token ids.

        Example:
            >>> import candle_llama
            >>> tokenizer = candle_llama.load_tokenizer("demo")
            >>> tokenizer.decode(tokenizer.encode("Hello, world"))
            'Hello, world'
        """
        if not isinstance(text, str):
            hint = "; encode_batch takes a list of texts" if isinstance(text, list | tuple) else ""
            raise TypeError(f"text must be a str, not {type(text).__name__}{hint}")
        check_text(text, "text")
        return self._core.encode(text, add_special_tokens, split_special_tokens)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[list[int]]:
        """Converts several texts to token ids, each as `encode` does.

        Example:
            >>> import candle_llama
            >>> tokenizer = candle_llama.load_tokenizer("demo")
            >>> tokenizer.encode_batch(["a", "b"]) == [tokenizer.encode("a"), tokenizer.encode("b")]
            True
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of str, not str; encode takes one text")
        return [self.encode(text, add_special_tokens, split_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Converts token ids to text.

        Args:
            ids: Token ids, as a list or a one-dimensional integer array.
            skip_special_tokens: Leave special tokens out.

        Raises:
            ValueError: An id is outside the model's vocabulary. Ids of padding rows, which are inside it but
                have no token, add nothing.
        """
        return self._core.decode(checked_token_ids(ids, "ids"), skip_special_tokens)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        *,
        continue_final_message: bool = False,
        tokenize: Literal[False] = False,
        **variables: Any,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        *,
        continue_final_message: bool = False,
        tokenize: Literal[True],
        **variables: Any,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        *,
        continue_final_message: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """Writes a conversation as the text that the model was trained on.

        Args:
            messages: The turns, as `{"role": ..., "content": ...}`, or objects with `model_dump`, such as
                pydantic's. Content that is a list of parts `{"type": "text", "text": ...}` is joined by line
                ends, and content that is None or missing is empty, if the template expects a string. The
                arguments of tool calls may be a dict or JSON; the template gets what it expects.
            chat_template: A Jinja template, or the name of one of the model's, to use instead of its default.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: End with the beginning of the assistant's turn. None means True, unless
                `continue_final_message` is set.
            continue_final_message: End with the last message's text, so that the model continues it.
            tokenize: Return token ids.
            **variables: Further variables of the template.

        Returns:
            The text, special tokens included: encode it with `add_special_tokens=False`. With `tokenize`,
            its token ids.

        Raises:
            ValueError: There are no messages, a part of a message is not text, the model has no chat
                template or none of that name, the template refuses the conversation, or the last message
                cannot be continued.
            TypeError: A message is not a dict with a role, or what is passed holds anything but dicts,
                lists, tuples, strings, numbers, booleans and None.

        Warns:
            UserWarning: The template never reads `tools`, or one of `variables`.

        Example:
            >>> import candle_llama
            >>> tokenizer = candle_llama.load_tokenizer("demo")
            >>> "hi" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
            True
        """
        if chat_template is not None and not isinstance(chat_template, str):
            raise TypeError(f"chat_template must be a str, not {type(chat_template).__name__}")
        check_text(chat_template or "", "chat_template")
        check_bool("continue_final_message", continue_final_message)
        given = plain({**variables, "messages": _messages(messages), "tools": _tools(tools)})
        given["messages"] = with_reasoning(given["messages"])
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt exclude each other: an answer either "
                "continues the last message or begins a new one"
            )
        final = _mark_end(given["messages"]) if continue_final_message else None
        given["add_generation_prompt"] = final is None and add_generation_prompt is not False
        template = self._compiled(*self._core.choose_chat_template(chat_template, tools is not None))
        unread = sorted(({*variables, "tools"} if tools else set(variables)) - template.names)
        if unread:
            warnings.warn(
                f"the chat template never reads {', '.join(map(repr, unread))}", UserWarning, stacklevel=2
            )
        # BOS and EOS are always there, so that a template can join them to other strings.
        given = {"bos_token": "", "eos_token": "", **self._core.special_tokens, "documents": None, **given}
        text = forms.render(template, given)
        if final is not None:
            text = _up_to_mark(text, final)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _variable_names(self, has_tools: bool) -> Set[str]:
        """Returns the names of the variables that the model's chat template reads."""
        return self._compiled(*self._core.choose_chat_template(None, has_tools)).names


@keywords(SOURCE)
def load_tokenizer(source: str | os.PathLike[str], **options: Unpack[SourceOptions]) -> Tokenizer:
    """Loads a tokenizer without its model; a GGUF file may hold only a vocabulary.

    Args:
        source: As for `load`.
        **options: `revision`, `token`, `cache_dir`, `local_files_only` and `progress`, as for `load`.

    Raises:
        FileNotFoundError: The source does not exist, or has no tokenizer.
        CheckpointError: The tokenizer's files are broken.
        UnsupportedModelError: This kind of tokenizer cannot be reproduced exactly.

    Warns:
        UserWarning: For each possible problem with the tokenizer's files.

    Example:
        >>> import candle_llama
        >>> candle_llama.load_tokenizer("demo").vocab_size
        49152
    """
    where = pick(options, SOURCE)
    path = hub.resolve(source, weights=False, **where)
    # The access token is not stored in the tokenizer, because tokenizers can be pickled.
    del where["token"]
    core = _core.Tokenizer.open(str(path))
    for message in core.warnings:
        warnings.warn(message, UserWarning, stacklevel=3)
    return Tokenizer(core, hub.portable(source), where)


def _reload(source: str, options: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(source, **options)


def checked_token_ids(ids: Any, name: str) -> list[int]:
    """Checks a list or an integer array of token ids and returns it as a list of int.

    Raises:
        TypeError: `ids` is something else.
        ValueError: An id is negative or has more than 32 bits.
    """
    if isinstance(ids, list | tuple):
        checked = list(ids)
        if any(type(item) is not int for item in checked):
            checked = [_token_id(item, name) for item in checked]
    elif hasattr(ids, "__array__"):
        checked = _array(ids, name)
    elif hasattr(ids, "tolist"):
        raise TypeError(f"{name} must be a list of int, not {type(ids).__name__}; pass its .tolist()")
    else:
        raise TypeError(f"{name} must be a list of int, not {type(ids).__name__}")
    for item in checked:
        if not 0 <= item < 2**32:
            raise ValueError(f"{name}: {shown(item)} is no token id")
    return checked


def _array(ids: Any, name: str) -> list[int]:
    """Converts what NumPy can read, such as an array or a tensor, to a list of int."""
    try:
        array = np.asarray(ids)
    except Exception as error:  # Any: a tensor on a GPU, for example, refuses in its own way.
        raise TypeError(f"{name} cannot be read as an array, pass a list of int: {error}") from None
    if array.dtype.kind not in ("i", "u") or array.ndim != 1:
        raise TypeError(
            f"{name} must be a one-dimensional integer array, not {array.ndim}-dimensional of {array.dtype}"
        )
    checked: list[int] = array.tolist()
    return checked


def _token_id(item: Any, name: str) -> int:
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise TypeError(f"{name} must hold int, not {type(item).__name__}")
    return int(item.__index__())


def _messages(messages: Any) -> list[Mapping[str, Any]]:
    if not isinstance(messages, list | tuple):
        raise TypeError(
            'messages is a list such as [{"role": "user", "content": "hi"}], '
            f"not {type(messages).__name__}; for plain text there is generate()"
        )
    if not messages:
        raise ValueError("messages is empty")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Any) -> Mapping[str, Any]:
    if not isinstance(message, Mapping) and callable(dump := getattr(message, "model_dump", None)):
        # Such objects have many fields that are None; templates test whether a key is there.
        message = dump(exclude_none=True)
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TypeError(f'messages[{index}] must be a dict with a "role" such as "user", not {message!r:.80}')
    content = message.get("content")
    if isinstance(content, list | tuple):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise ValueError(f"messages[{index}]: only parts of type 'text' are understood, not {kind!r}")
            _content(index, part.get("text"))
    elif content is not None:
        _content(index, content)
    return message


def _content(index: int, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"messages[{index}]: content must be a str, not {type(text).__name__}")
    check_text(text, f"messages[{index}]")


_MARK = "END-OF-THE-MESSAGE-TO-CONTINUE-6f1d"


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Marks the end of the last message. Returns its text."""
    content = messages[-1].get("content")
    # The space shows whether the template trims messages.
    if isinstance(content, str):
        messages[-1]["content"] = content + _MARK + " "
        return content
    for part in reversed(content or []):
        text = part.get("text")
        if isinstance(text, str):
            part["text"] = text + _MARK + " "
            return text
    raise ValueError("continue_final_message: the last message has no text to continue")


def _up_to_mark(text: str, final: str) -> str:
    at = text.rfind(_MARK)
    if at < 0 or final.strip() not in text:
        raise ValueError(
            "continue_final_message: the chat template does not write the last message as it is, so nothing "
            "can continue it"
        )
    return text[:at] if text.startswith(_MARK + " ", at) else text[:at].rstrip()


def _tools(tools: Any) -> list[Mapping[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise TypeError(f"tools must be a list of JSON schemas (dicts), not {type(tools).__name__}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            what = "a function: describe it by its JSON schema" if callable(tool) else type(tool).__name__
            raise TypeError(f"tools[{index}] must be a JSON schema (a dict), not {what}")
    return list(tools)
