"""The model: load it, then generate, stream, chat, or take its logits."""

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack, overload

import numpy as np
import numpy.typing as npt

from candle_llama import _core, hub, sampling
from candle_llama.options import LOADING, SOURCE, LoadOptions, check_positive, keywords, pick
from candle_llama.sampling import SamplingOptions, SamplingParams
from candle_llama.stream import Stream, completion
from candle_llama.tokenizer import Tokenizer, checked_token_ids
from candle_llama.types import (
    Completion,
    Config,
    LoadReport,
    LogLikelihood,
    Message,
    Score,
    StorageType,
)

TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
Prompt: TypeAlias = str | TokenIds

_MOST_LOGITS_BYTES = 2 * 1024**3


@keywords(SOURCE, LOADING)
def load(source: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> "Llama":
    """Loads a model.

    Args:
        source: A folder, a .gguf file, a hub id ("org/name" or "org/name:file.gguf"), or "demo". What
            exists, is absolute, starts with "./", "../" or "~", or ends in ".gguf" is a path.
        device: "auto", "cpu", "cuda", "cuda:0" or "metal".
        dtype: "auto" keeps the type in which the weights are stored.
        quantize: Round float matrices to blocks of 8 or 4 bits while they load, one at a time: half or a
            quarter of bfloat16's memory, and faster by as much. `candle_llama.quantize` writes a file.
        compute: "auto" rounds activations to 8 bits (16 in prompts of up to 128 tokens) where weights are in
            blocks of 32, and on processors that are fast at it both to bfloat16 in longer prompts (see
            docs/kernels.md); "exact" computes with float32 activations and KV cache everywhere.
        kv_dtype: The type of cached keys and values. "auto" is float16, with compute="exact" float32, which
            allows no other. float16 holds 11 bits of a number up to 65504, beyond which keys become
            infinite and logits NaN; bfloat16 holds 8 bits of any. The candle engine takes the type that it
            computes with and refuses others.
        engine: "cpu" is this package's own decoder, "candle" Candle's Llama; "auto" takes "cpu" on the CPU.
        threads: None takes the cores that this process may really use.
        context_length: Positions of the context; None is the model's own, bounded by memory.
        strict: Refuse what would otherwise load with a warning.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub; None takes the stored login or HF_TOKEN.
        cache_dir: Where downloads are kept; None is the hub client's own cache.
        local_files_only: Take what is in the cache and stay off the network.
        progress: Show progress bars if stderr is a terminal.

    Returns:
        The model, ready to use.

    Raises:
        FileNotFoundError: There is no such file, folder, repository, or a part of the model is missing.
        CheckpointError: The files are broken or refused by `strict`.
        UnsupportedModelError: The model cannot be run exactly.
        DeviceError: The device cannot be used, or its memory (for the CPU with swap, within the limits of
            cgroup and ulimit) is too small for the weights and the context.
        ValueError: An argument is out of its range.

    Warns:
        UserWarning: Once for each of `Llama.load_report.warnings`.

    Example:
        >>> import candle_llama
        >>> llm = candle_llama.load("demo")
        >>> llm.load_report.lm_head
        'tied'
    """
    where, how = pick(options, SOURCE), pick(options, LOADING)
    path = hub.resolve(source, **where)
    # An access token is not kept: models are pickled.
    del where["token"]
    llm = Llama(_core.Llama(str(path), how), hub.portable(source), where, how)
    for message in llm.load_report.warnings:
        warnings.warn(message, UserWarning, stacklevel=3)
    return llm


class Llama:
    """A loaded model; `load` makes one.

    All methods may be called from several threads. Pickling keeps where the model came from and how
    it was loaded, but no access token; unpickling loads it again. A copy is the model itself: it never
    changes, and its weights are not held twice.

    A process that was forked (`os.fork`, or multiprocessing's "fork") has the model's memory but not its
    threads: there every use is a GenerationError. Load the model in that process, or use the "spawn" or
    "forkserver" method.

    Attributes:
        config: Every field of config.json, plus what was derived.
        load_report: What loading did and decided.
    """

    config: Config
    load_report: LoadReport

    def __init__(
        self, core: _core.Llama, source: str, where: Mapping[str, Any], how: Mapping[str, Any]
    ) -> None:
        self._core = core
        self._source = source
        self._where = dict(where)
        self._how = dict(how)
        self.config = Config(core.config)
        self.load_report = _load_report(core.load_report)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            FileNotFoundError: The model came without one.
            CheckpointError: Its files are broken.
        """
        return Tokenizer(self._core.tokenizer, self._source, self._where)

    # To the type checker a str is a list of str as well; the first signature that fits wins.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]:
        """Continues one prompt, or each prompt of a list.

        The `cpu` engine generates up to eight prompts of a list together, as memory allows: one pass over the
        weights reads some hundred tokens of the prompts, later ones give a token of each. Each gets what it
        would get alone, bit for bit.

        Args:
            prompt: Text, which gets BOS as the tokenizer's config says; token ids, which are used as they
                are; or a list of such prompts.
            params: Sampling parameters; keywords override them.
            **options: Sampling parameters, as in `SamplingParams`.

        Returns:
            A completion, or a list of them in the order of the prompts.

        Raises:
            ContextLengthError: A prompt leaves no room in the context; told before the first is read.
            ValueError: A prompt is empty, or a value is out of its range.
            TypeError: A parameter is unknown, or a value has the wrong type.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> out = llm.generate("The capital of France is", max_new_tokens=8)
            >>> out.finish_reason
            'length'
            >>> len(llm.generate(["One, two,", "A, B,"], max_new_tokens=4))
            2
        """
        given = sampling.merge(params, options)
        if _is_batch(prompt):
            prompts = [_prompt(item, f"prompt[{index}]") for index, item in enumerate(prompt)]
            return [completion(found) for found in self._core.generate_all(prompts, given)]
        return completion(self._core.generate(_prompt(prompt, "prompt"), given))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Stream:
        """Continues one prompt piece by piece.

        Arguments and errors are those of `generate`, except that a list of prompts is a TypeError.

        Returns:
            An iterator of chunks, whose texts joined are the text that `generate` returns. Closing it
            stops the work.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> text = "".join(chunk.text for chunk in llm.stream("Once upon a time", max_new_tokens=8))
            >>> text == llm.generate("Once upon a time", max_new_tokens=8).text
            True
        """
        given = sampling.merge(params, options)
        if _is_batch(prompt):
            raise TypeError("stream takes one prompt, not a list; generate takes lists")
        return Stream(self._core.stream(_prompt(prompt, "prompt"), given))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """Answers a conversation.

        Args:
            messages: The turns so far, as `{"role": ..., "content": ...}`.
            params: Sampling parameters; keywords override them.
            tools: JSON schemas of the functions that the model may call.
            chat_template: A Jinja template to use instead of the model's own.
            template_variables: Further variables of the template.
            **options: Sampling parameters, as in `SamplingParams`.

        Returns:
            The assistant's turn.

        Raises:
            CandleLlamaError: The model has no chat template, or the template refuses the conversation.
            ContextLengthError: The conversation leaves no room in the context.
            ValueError: There are no messages, or a value is out of its range.
            TypeError: A message is not a dict with a role, or a parameter is unknown.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> messages = [{"role": "user", "content": "What is the capital of France?"}]
            >>> "Paris" in llm.chat(messages, max_new_tokens=32).text
            True
        """
        given = sampling.merge(params, options)
        ids = self._chat_ids(messages, tools, chat_template, template_variables)
        return completion(self._core.generate(ids, given))

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Answers a conversation piece by piece.

        Arguments and errors are those of `chat`, and the result is that of `stream`.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> with llm.stream_chat([{"role": "user", "content": "Hello!"}], max_new_tokens=8) as stream:
            ...     text = "".join(chunk.text for chunk in stream)
            >>> len(text) > 0
            True
        """
        given = sampling.merge(params, options)
        ids = self._chat_ids(messages, tools, chat_template, template_variables)
        return Stream(self._core.stream(ids, given))

    def logits(self, token_ids: TokenIds, last: int | None = None) -> npt.NDArray[np.float32]:
        """Computes the scores of every token of the vocabulary, after each token of a text.

        Args:
            token_ids: The text as token ids.
            last: Only the last `last` rows; None is all.

        Returns:
            Logits before any processing, of shape (rows, vocab_size).

        Raises:
            ValueError: There are no tokens, an id is outside the vocabulary, or the result would exceed
                2 GiB.
            ContextLengthError: The text exceeds the context.
            TypeError: `token_ids` is text, or an argument has another wrong type.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> llm.logits(llm.tokenizer.encode("Paris is the capital of"), last=1).shape
            (1, 49152)
        """
        if isinstance(token_ids, str):
            raise TypeError("logits takes token ids, not text: llm.logits(llm.tokenizer.encode(text))")
        ids = checked_token_ids(token_ids, "token_ids")
        if last is not None:
            check_positive("last", last)
        rows = len(ids) if last is None else min(int(last), len(ids))
        size = rows * int(self.config.vocab_size) * 4
        if size > _MOST_LOGITS_BYTES:
            raise ValueError(
                f"the logits of {rows} tokens would take {size / 1024**3:.1f} GiB, more than 2 GiB: "
                "ask for fewer rows with last=, or call it in pieces"
            )
        return self._core.logits(ids, None if last is None else rows)

    @overload
    def score(self, prompt: Prompt) -> Score: ...  # type: ignore[overload-overlap]
    @overload
    def score(self, prompt: Sequence[str] | Sequence[Prompt]) -> list[Score]: ...
    def score(self, prompt: Prompt | Sequence[Prompt]) -> Score | list[Score]:
        """Computes how likely a text is: the log-probability of each token given those before it.

        The text is read in chunks, whose logits are dropped again: memory does not grow with its length
        times the vocabulary.

        Args:
            prompt: Text, which gets BOS as the tokenizer's config says; token ids, which are used as they
                are; or a list of such texts.

        Returns:
            Log-probabilities and perplexity, or a list of them in the order of the texts.

        Raises:
            ValueError: A text has less than two tokens, so that none has another before it, or an id is
                outside the vocabulary.
            ContextLengthError: A text exceeds the context by more than its last token, which is not read.
            TypeError: `prompt` is neither text nor token ids.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> score = llm.score("The capital of France is Paris.")
            >>> score.logprobs[0] is None and max(score.logprobs[1:]) <= 0
            True
            >>> score.perplexity < llm.score("The capital of France is purple.").perplexity
            True
        """
        if _is_batch(prompt):
            prompts = [_prompt(item, f"prompt[{index}]") for index, item in enumerate(prompt)]
            return [Score(**self._core.score(item)) for item in prompts]
        return Score(**self._core.score(_prompt(prompt, "prompt")))

    def loglikelihood(self, context: Prompt, continuation: Prompt) -> LogLikelihood:
        """Computes how likely one text is after another.

        Two texts are split into tokens as lm-eval's harness does: spaces at the end of the context are
        moved to the beginning of the continuation, both are encoded together (with BOS as the tokenizer's
        config says), and the continuation is what comes after as many tokens as the context has alone. A
        text beside token ids is encoded on its own, and token ids are used as they are.

        Args:
            context: What comes before, as text or token ids; at least one token, which BOS may be.
            continuation: What is scored, as text or token ids.

        Returns:
            The sum of the continuation's log-probabilities, and whether it is what greedy decoding gives.

        Raises:
            ValueError: The context or the continuation has no tokens, or an id is outside the vocabulary.
            ContextLengthError: Both together exceed the context by more than the last token, which is not
                read.
            TypeError: An argument is neither text nor token ids.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> paris, lyon = (llm.loglikelihood("The capital of France is", x) for x in (" Paris", " Lyon"))
            >>> paris.sum > lyon.sum
            True
        """
        found = self._core.loglikelihood(_prompt(context, "context"), _prompt(continuation, "continuation"))
        return LogLikelihood(**found)

    def close(self) -> None:
        """Frees the model's memory; further use is an error. Closing twice is fine."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        report = self.load_report
        return f"<Llama from {self._source}: {report.engine} engine on {report.device}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reload, (self._source, {**self._where, **self._how})

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def _chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template: str | None,
        template_variables: Mapping[str, Any] | None,
    ) -> list[int]:
        tokenizer = self.tokenizer
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tools=tools, **(template_variables or {})
        )
        # The template writes BOS and the other special tokens itself.
        return tokenizer.encode(text, add_special_tokens=False)


def _reload(source: str, options: dict[str, Any]) -> Llama:
    return load(source, **options)


def _is_batch(prompt: object) -> bool:
    """Tells a list of prompts from one prompt: a flat list of ints is one."""
    return isinstance(prompt, list | tuple) and not any(isinstance(item, int | np.integer) for item in prompt)


def _prompt(prompt: Any, name: str) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple) and not hasattr(prompt, "dtype"):
        raise TypeError(f"{name} must be a str or a list of token ids, not {type(prompt).__name__}")
    return checked_token_ids(prompt, name)


def _load_report(fields: dict[str, Any]) -> LoadReport:
    storage = {name: StorageType(**size) for name, size in fields["storage"].items()}
    return LoadReport(**{**fields, "storage": storage})
