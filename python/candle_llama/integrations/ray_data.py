"""Answers the rows of a Ray dataset. Needs the extra `ray`.

Each actor loads the model once, and answers the rows of a batch together:

    import ray
    from candle_llama import SamplingParams
    from candle_llama.integrations.ray_data import LlamaBatch

    dataset = ray.data.from_items([{"prompt": "The capital of France is"}])
    dataset.map_batches(
        LlamaBatch,
        fn_constructor_kwargs={"source": "demo", "params": SamplingParams(max_new_tokens=32)},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=2,
        batch_size=256,
    ).show()

docs/scale.md says how to choose these numbers.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import candle_llama
from candle_llama import Completion, SamplingParams
from candle_llama.errors import InternalError
from candle_llama.integrations import ray_threads
from candle_llama.options import LoadOptions

Batch: TypeAlias = dict[str, npt.NDArray[Any]]
"""Columns by name, each with one element per row."""

_THREADS = 64
"""Conversations that are answered at a time; the engine runs them together."""
_CHAT_OPTIONS = ("tools", "chat_template", "template_variables")


class LlamaBatch:
    """A model for `Dataset.map_batches`, with its default batch format.

    A batch comes back with all its columns, and with these:

    - `text`: the answer.
    - `token_ids`: the answer's tokens, a list of int.
    - `finish_reason`: "stop", "length" or "timeout".
    - `prompt_tokens`: number of the prompt's tokens.
    - `logprobs`, if `params` asks for them: for each token `token_id`, `logprob` and `top`, which is a list
      of `token_id` and `logprob`.
    - `error`, with `return_exceptions`: None, or the class and the message of the row's error. The row's
      other new columns are None then.

    A row's answer is the one that `Llama.generate` or `Llama.chat` gives, whatever else is in its batch. So a
    batch that Ray runs again, because its actor died, has the same answers, if `params` are greedy or have a
    seed.

    Args:
        source: The model, as for `candle_llama.load`. A path must exist on every node.
        prompt_column: The column of prompts: text, or lists of token ids. "prompt", if there is no
            `messages_column`.
        messages_column: The column of conversations, as for `Llama.chat`. Keys whose value is None are left
            out, because Arrow adds such keys where only other rows have them.
        params: Sampling parameters of all rows.
        load_options: Keywords for `candle_llama.load`. `threads` is the number of the actor's CPUs, unless it
            is given.
        chat_options: `tools`, `chat_template` and `template_variables` of `Llama.chat`, for conversations.
        return_exceptions: Put the error of a row into the column `error`. Otherwise the first error fails the
            batch, and with it Ray's job. Errors that mean that the engine has failed always do.
        output_prefix: What the names of the new columns begin with.

    Raises:
        TypeError: An option is unknown, or does not go with the others.
        Exception: What `candle_llama.load` raises.

    Example:
        >>> import numpy as np
        >>> from candle_llama import SamplingParams
        >>> from candle_llama.integrations.ray_data import LlamaBatch
        >>> answer = LlamaBatch("demo", params=SamplingParams(max_new_tokens=8))
        >>> batch = answer({"prompt": np.array(["The capital of France is"])})
        >>> "Paris" in batch["text"][0]
        True
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        prompt_column: str | None = None,
        messages_column: str | None = None,
        params: SamplingParams | None = None,
        load_options: LoadOptions | None = None,
        chat_options: Mapping[str, Any] | None = None,
        return_exceptions: bool = False,
        output_prefix: str = "",
    ) -> None:
        if prompt_column is not None and messages_column is not None:
            raise TypeError("rows have either prompts or messages: give prompt_column or messages_column")
        if chat_options and messages_column is None:
            raise TypeError("chat_options are for conversations: give messages_column")
        if unknown := set(chat_options or {}) - {*_CHAT_OPTIONS}:
            raise TypeError(f"chat_options: {sorted(unknown)} is none of {', '.join(_CHAT_OPTIONS)}")
        self._column = messages_column or prompt_column or "prompt"
        self._answer = self._generate if messages_column is None else self._chat
        self._params = params or SamplingParams()
        self._chat_options = dict(chat_options or {})
        self._return_exceptions = return_exceptions
        self._prefix = output_prefix
        self.llm = candle_llama.load(source, **ray_threads.load_options(load_options))

    def __call__(self, batch: Batch) -> Batch:
        """Answers the rows of a batch.

        Raises:
            KeyError: The batch has no such column.
            ValueError: The batch has a column whose name a new one would get.
            Exception: Without `return_exceptions`, the first error of a row.
        """
        if self._column not in batch:
            raise KeyError(f"the batch has no column {self._column!r}; its columns are {', '.join(batch)}")
        columns = {self._prefix + name: read for name, read in self._columns().items()}
        if taken := sorted(columns.keys() & batch.keys()):
            raise ValueError(
                f"the batch already has a column {taken[0]!r}: give an output_prefix, or rename the column"
            )
        found = self._answer(list(batch[self._column]))
        for answer in found:
            if isinstance(answer, Exception) and (
                not self._return_exceptions or isinstance(answer, InternalError)
            ):
                raise answer
        return {**batch, **{name: _column(map(read, found)) for name, read in columns.items()}}

    def _columns(self) -> dict[str, Callable[[Completion | Exception], Any]]:
        """Returns the new columns: how each is read from an answer."""
        columns = {
            "text": _field(lambda answer: answer.text),
            "token_ids": _field(lambda answer: answer.token_ids),
            "finish_reason": _field(lambda answer: answer.finish_reason),
            "prompt_tokens": _field(lambda answer: answer.prompt_tokens),
        }
        if self._params.logprobs is not None:
            columns["logprobs"] = _field(_logprobs)
        if self._return_exceptions:
            columns["error"] = _error
        return columns

    def _generate(self, prompts: list[Any]) -> list[Completion | Exception]:
        # A list with a bare number would be one prompt of token ids; an array without a dimension is none.
        given = [np.asarray(prompt) if isinstance(prompt, np.integer) else prompt for prompt in prompts]
        return self.llm.generate(given, self._params, return_exceptions=True)

    def _chat(self, conversations: list[Any]) -> list[Completion | Exception]:
        def answer(messages: Any) -> Completion | Exception:
            try:
                return self.llm.chat(_plain(messages), self._params, **self._chat_options)
            except Exception as error:
                return error

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(answer, conversations))


def _plain(value: Any) -> Any:
    """Converts a conversation from Arrow's form: arrays to lists, and keys that are None are left out."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | np.ndarray):
        return [_plain(item) for item in value]
    return value


def _field(read: Callable[[Completion], Any]) -> Callable[[Completion | Exception], Any]:
    return lambda answer: None if isinstance(answer, Exception) else read(answer)


def _error(answer: Completion | Exception) -> str | None:
    return f"{type(answer).__name__}: {answer}" if isinstance(answer, Exception) else None


def _logprobs(answer: Completion) -> list[dict[str, Any]]:
    # Arrow has no tuples of different types.
    return [
        {
            "token_id": token.token_id,
            "logprob": token.logprob,
            "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top],
        }
        for token in answer.logprobs or []
    ]


def _column(values: Iterable[Any]) -> npt.NDArray[Any]:
    """Makes a column. Lists stay lists, also if all have the same length."""
    rows = list(values)
    column = np.empty(len(rows), dtype=object)
    for index, value in enumerate(rows):
        column[index] = value
    return column
