"""The model: load it, then generate, stream, chat, score texts, or compute logits."""

import os
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeGuard, Unpack, overload

import numpy as np
import numpy.typing as npt

from candle_llama import _core, async_stream, batch, hub, sampling
from candle_llama.async_stream import AsyncStream
from candle_llama.options import LOADING, SOURCE, LoadOptions, check_positive, check_text, keywords, pick
from candle_llama.sampling import SamplingOptions, SamplingParams
from candle_llama.stream import Stream, completion
from candle_llama.tokenizer import Tokenizer, checked_token_ids
from candle_llama.types import (
    Completion,
    Config,
    LoadReport,
    LogLikelihood,
    Message,
    Metrics,
    Score,
    StorageType,
)

TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
Prompt: TypeAlias = str | TokenIds

_MOST_LOGITS_BYTES = 2 * 1024**3
_LONG_TEXT = 20_000
"""Longer texts are tokenised in a thread, so that the event loop does not wait for it."""


@keywords(SOURCE, LOADING)
def load(source: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> "Llama":
    """Loads a model.

    Args:
        source: A folder, a .gguf file, a hub id ("org/name" or "org/name:file.gguf"), or "demo". A source is
            a path if it exists, is absolute, starts with "./", "../" or "~", or ends in ".gguf".
        device: "auto", "cpu", "cuda", "cuda:0" or "metal".
        dtype: "auto" keeps the type in which the weights are stored.
        quantize: "q8_0" or "q4_0" quantises float matrices to 8 or 4 bits while they load, one at a time.
            They take a half or a quarter of bfloat16's memory, and run faster by the same factor. One of
            llama.cpp's mixtures ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k") gives
            matrices the types that `candle_llama.quantize` writes to a file; loading then takes longer.
            Matrices whose rows are no whole blocks stay as they are, as do quantised ones;
            `load_report.notes` counts both. "q8_0" and "q4_0" also leave an embedding that is not the head.
        compute: "auto" rounds activations to 8 bits if weights are quantised, to 16 bits in prompts of up to
            128 tokens. In longer prompts, processors with fast bfloat16 arithmetic round
            activations and weights to bfloat16 (see docs/kernels.md). "exact" uses float32 activations and
            a float32 KV cache everywhere.
        kv_dtype: The type of the KV cache. "auto" is float16, or float32 with compute="exact", which allows
            no other. float16 has 11 bits of precision, but keys above 65504 become infinite and logits NaN;
            bfloat16 has 8 bits of precision and float32's range. "q8_0" has 8 bits and a scale for each 32
            numbers, and takes 0.53 of float16's memory; head_dim must be a multiple of 32. The tensor and
            the candle engine use the type that they compute with and refuse others.
        engine: "cpu" is this package's own decoder for the CPU; "tensor" is its decoder in Candle's tensor
            operations, for any device; "candle" is Candle's own Llama. "auto" uses "cpu" on the CPU and
            "tensor" on other devices.
        threads: Number of threads; None uses the performance cores that CPU affinity and cgroup quota allow.
        context_length: Length of the context in tokens; None is the model's own, reduced if memory is short.
        max_num_seqs: At most so many requests run together, by default up to 32; others wait for their turn.
            The candle engine runs a forward pass of its own for each.
        kv_cache_bytes: Memory for the keys and values of all requests; None is bounded by free memory. It
            also bounds `context_length`; in the tensor engine, how many requests run together. The candle
            engine ignores it.
        prefix_cache: Keep the keys and values of prompts, for later prompts with the same beginning. Answers
            are bit-identical with and without it. While nobody waits, the answer of a chat is read again, so
            that its next turn finds it. Only the cpu engine has such a cache.
        strict: Raise an error where loading would otherwise only warn.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub; None uses the stored login or HF_TOKEN.
        cache_dir: Where downloads are kept; None is the hub client's own cache.
        local_files_only: Use only the cache, not the network.
        progress: Show progress bars in terminals and notebooks; elsewhere write a line to stderr every few
            seconds of a download.

    Returns:
        The model, ready to use.

    Raises:
        FileNotFoundError: The file, folder or repository does not exist, or a part of the model is missing.
        CheckpointError: The files are broken or refused by `strict`.
        UnsupportedModelError: The model cannot be run exactly.
        DeviceError: The device cannot be used, or its memory is too small for the weights and the context.
            For the CPU, memory includes swap, within the limits of cgroup and ulimit.
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
    # The access token is not stored in the model, because models can be pickled.
    del where["token"]
    llm = Llama(_core.Llama(str(path), how), hub.portable(source), where, how)
    for message in llm.load_report.warnings:
        warnings.warn(message, UserWarning, stacklevel=3)
    return llm


class Llama:
    """A loaded model; `load` makes one.

    All methods may be called from several threads. A pickled model holds its source and load options, but
    no access token; unpickling loads the model again. Copying returns the same object: a model never
    changes, and its weights are not held twice.

    A forked process (`os.fork`, or multiprocessing's "fork") has the model's memory but not its threads:
    every use there raises GenerationError. Load the model in that process, or use the "spawn" or
    "forkserver" method.

    Attributes:
        config: Every field of config.json, plus derived fields.
        load_report: How the model was loaded.
    """

    config: Config
    load_report: LoadReport

    def __new__(cls, *args: object, **_: object) -> Self:
        """Refuses what other packages take, such as a path; `load` makes a model."""
        if not args or not isinstance(args[0], _core.Llama):
            raise TypeError(
                'Llama(...) does not load a model: use candle_llama.load("model.gguf"); it takes a folder, '
                "a .gguf file or a hub id"
            )
        return super().__new__(cls)

    def __init__(
        self, core: _core.Llama, source: str, where: Mapping[str, Any], how: Mapping[str, Any]
    ) -> None:
        self._core = core
        self._source = source
        self._where = dict(where)
        self._how = dict(how)
        self._tokenizer: Tokenizer | None = None
        self.config = Config(core.config)
        self.load_report = _load_report(core.load_report)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            FileNotFoundError: The model has no tokenizer.
            CheckpointError: The tokenizer's files are broken.
        """
        # No cached_property: before Python 3.12 it has a lock, which a forked child may find held for ever.
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._core.tokenizer, self._source, self._where)
        return self._tokenizer

    # For type checkers a str is also a sequence of str, so the overload for a single prompt comes first.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        return_exceptions: Literal[False] = False,
        progress: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        return_exceptions: bool,
        progress: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion | Exception]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        return_exceptions: bool = False,
        progress: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion] | list[Completion | Exception]:
        """Continues one prompt, or each prompt of a list.

        The `cpu` engine runs the requests of all callers together, up to `max_num_seqs` as memory allows. A
        forward pass decodes one token of each, and processes a part of a new prompt. A list of any length is
        one continuous batch: whenever a prompt is complete, the next one begins. Results are bit-identical to
        running each prompt alone.

        Args:
            prompt: Text, to which BOS is added if the tokenizer's config says so; token ids, which are used
                unchanged, as a list, a NumPy array or a tensor; or a list of such prompts.
            params: Sampling parameters; keywords override them. A list of prompts may have a list of them,
                one for each prompt.
            return_exceptions: For a list of prompts: put the error of a prompt in its place in the result.
                Otherwise a bad prompt raises before any is processed, and a later error is raised after all
                prompts have ended.
            progress: For a list of prompts: show a progress bar, if stderr is a terminal.
            **options: Sampling parameters, as in `SamplingParams`.

        Returns:
            A completion, or a list of them in the order of the prompts.

        Raises:
            ContextLengthError: A prompt leaves no room in the context.
            ValueError: A prompt is empty, a value is out of its range, or there are not as many params as
                prompts.
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
        if not _is_batch(prompt):
            given = sampling.merge(batch.single(params, return_exceptions, progress), options)
            fields = self._core.generate(_prompt(prompt, "prompt"), given, False)
            self._warn()
            return completion(fields, given)
        requests = batch.requests(prompt, params, options, _prompt, return_exceptions)
        found = batch.run(self._core, requests, return_exceptions, progress)
        self._warn()
        return found if return_exceptions else batch.raise_first(found)

    @overload
    async def agenerate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Completion: ...
    @overload
    async def agenerate(
        self,
        prompt: Sequence[str] | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        return_exceptions: Literal[False] = False,
        progress: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]: ...
    @overload
    async def agenerate(
        self,
        prompt: Sequence[str] | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        return_exceptions: bool,
        progress: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion | Exception]: ...
    async def agenerate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        return_exceptions: bool = False,
        progress: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion] | list[Completion | Exception]:
        """Does what `generate` does, in an event loop.

        Arguments, results and errors are those of `generate`. The requests of all tasks run together.
        Cancelling the task stops the work within one forward pass.

        Example:
            >>> import asyncio, candle_llama
            >>> llm = candle_llama.load("demo")
            >>> out = asyncio.run(llm.agenerate("The capital of France is", max_new_tokens=8))
            >>> out.finish_reason
            'length'
        """
        if not _is_batch(prompt):
            given = sampling.merge(batch.single(params, return_exceptions, progress), options)
            request = await self._request((_prompt(prompt, "prompt"), given))
            return await self._whole(request, given)
        requests = batch.requests(prompt, params, options, _prompt, return_exceptions)
        found = await batch.gather(self._request, self._whole, requests, return_exceptions, progress)
        return found if return_exceptions else batch.raise_first(found)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Stream:
        """Continues one prompt piece by piece.

        Arguments and errors are those of `generate`, except that a list of prompts is a TypeError.

        Returns:
            An iterator of chunks. Their joined texts are the text that `generate` returns. Closing the
            iterator stops the generation.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> text = "".join(chunk.text for chunk in llm.stream("Once upon a time", max_new_tokens=8))
            >>> text == llm.generate("Once upon a time", max_new_tokens=8).text
            True
        """
        stream = self._start(_one_prompt(prompt, "stream"), sampling.merge(params, options), False)
        self._warn()
        return Stream(stream)

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> AsyncStream:
        """Does what `stream` does, for `async for` in an event loop.

        Arguments and errors are those of `stream`. Cancelling the task that reads stops the generation within
        one forward pass.

        Example:
            >>> import asyncio, candle_llama
            >>> llm = candle_llama.load("demo")
            >>> async def text():
            ...     chunks = llm.astream("Once upon a time", max_new_tokens=8)
            ...     return "".join([chunk.text async for chunk in chunks])
            >>> asyncio.run(text()) == llm.generate("Once upon a time", max_new_tokens=8).text
            True
        """
        stream = self._start(_one_prompt(prompt, "astream"), sampling.merge(params, options), False)
        self._warn()
        return AsyncStream(stream)

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
            messages: The turns so far, as for `Tokenizer.apply_chat_template`.
            params: Sampling parameters; keywords override them.
            tools: JSON schemas of the functions that the model may call.
            chat_template: A Jinja template, or the name of one of the model's, to use instead of its default.
            template_variables: More variables for the template.
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
        ids, is_answer = self._chat_ids(messages, tools, chat_template, template_variables)
        fields = self._core.generate(ids, given, is_answer)
        self._warn()
        return completion(fields, given)

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
        ids, is_answer = self._chat_ids(messages, tools, chat_template, template_variables)
        stream = self._start(ids, given, is_answer)
        self._warn()
        return Stream(stream)

    async def achat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """Does what `chat` does, in an event loop.

        Arguments, results and errors are those of `chat`. Cancelling the task stops the work within one
        forward pass.

        Example:
            >>> import asyncio, candle_llama
            >>> llm = candle_llama.load("demo")
            >>> messages = [{"role": "user", "content": "What is the capital of France?"}]
            >>> "Paris" in asyncio.run(llm.achat(messages, max_new_tokens=32)).text
            True
        """
        given = sampling.merge(params, options)
        ids, is_answer = self._chat_ids(messages, tools, chat_template, template_variables)
        stream = self._start(ids, given, is_answer)
        self._warn()
        return await async_stream.whole(stream, given)

    def astream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """Does what `stream_chat` does, for `async for` in an event loop.

        Arguments and errors are those of `chat`, and the result is that of `astream`.

        Example:
            >>> import asyncio, candle_llama
            >>> llm = candle_llama.load("demo")
            >>> async def text():
            ...     async with llm.astream_chat([{"role": "user", "content": "Hello!"}]) as stream:
            ...         return "".join([chunk.text async for chunk in stream])
            >>> len(asyncio.run(text())) > 0
            True
        """
        given = sampling.merge(params, options)
        ids, is_answer = self._chat_ids(messages, tools, chat_template, template_variables)
        stream = self._start(ids, given, is_answer)
        self._warn()
        return AsyncStream(stream)

    def logits(self, token_ids: TokenIds, last: int | None = None) -> npt.NDArray[np.float32]:
        """Computes the logits after each token of a text: a score of every token of the vocabulary.

        Args:
            token_ids: The text as token ids.
            last: Return only this many rows, the last ones; None returns all.

        Returns:
            Unprocessed logits of shape (rows, vocab_size).

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
        return self._logits(token_ids, last, None)

    def _logits(
        self, token_ids: TokenIds, last: int | None, cancellation: _core.Cancellation | None
    ) -> npt.NDArray[np.float32]:
        """Does what `logits` does; another thread may cancel it."""
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
        return self._core.logits(ids, None if last is None else rows, cancellation)

    @overload
    def score(self, prompt: Prompt) -> Score: ...  # type: ignore[overload-overlap]
    @overload
    def score(self, prompt: Sequence[str] | Sequence[Prompt]) -> list[Score]: ...
    def score(self, prompt: Prompt | Sequence[Prompt]) -> Score | list[Score]:
        """Computes how likely a text is: the log-probability of each token given those before it.

        The text is processed in chunks, and the logits of a chunk are freed after use. So memory does not
        grow with the length of the text times the size of the vocabulary.

        Args:
            prompt: Text, to which BOS is added if the tokenizer's config says so; token ids, which are used
                unchanged; or a list of such texts.

        Returns:
            Log-probabilities and perplexity, or a list of them in the order of the texts.

        Raises:
            ValueError: A text has fewer than two tokens (the first one has no probability), or an id is
                outside the vocabulary.
            ContextLengthError: A text is longer than the context plus one token; the last token of a text
                is scored, but not processed.
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
            scores = [Score(**self._core.score(item)) for item in prompts]
            self._warn()
            return scores
        score = Score(**self._core.score(_prompt(prompt, "prompt")))
        self._warn()
        return score

    def loglikelihood(self, context: Prompt, continuation: Prompt) -> LogLikelihood:
        """Computes how likely one text is after another.

        Two texts are tokenised as lm-eval's harness does: spaces at the end of the context move to the
        beginning of the continuation. Both are encoded together, with BOS if the tokenizer's config says so.
        The first tokens, as many as the context has when it is encoded alone, are the context; the others
        are the continuation. If only one of the two is text, it is encoded alone. Token ids are used
        unchanged.

        Args:
            context: The text or token ids before the continuation; at least one token, BOS included.
            continuation: The text or token ids to score.

        Returns:
            The sum of the continuation's log-probabilities, and whether greedy decoding would give it.

        Raises:
            ValueError: The context or the continuation has no tokens, or an id is outside the vocabulary.
            ContextLengthError: Both together are longer than the context plus one token; the last token is
                scored, but not processed.
            TypeError: An argument is neither text nor token ids.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> paris, lyon = (llm.loglikelihood("The capital of France is", x) for x in (" Paris", " Lyon"))
            >>> paris.sum > lyon.sum
            True
        """
        found = self._core.loglikelihood(_prompt(context, "context"), _prompt(continuation, "continuation"))
        self._warn()
        return LogLikelihood(**found)

    def metrics(self) -> Metrics:
        """Returns counts of what the model's engine does and has done.

        Example:
            >>> import candle_llama
            >>> llm = candle_llama.load("demo")
            >>> out = llm.generate("The capital of France is", max_new_tokens=8)
            >>> llm.metrics().tokens_out
            8
        """
        return Metrics(**self._core.metrics())

    def close(self) -> None:
        """Ends all requests with an error, and frees the model's memory. Further use is an error.

        Closing twice is fine.
        """
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

    def _start(self, prompt: str | list[int], given: dict[str, Any], is_answer: bool) -> _core.Stream:
        return self._core.start(self._core.request(prompt, given, is_answer))

    async def _request(self, request: batch.Request) -> _core.Request:
        prompt, given = request
        if isinstance(prompt, str) and len(prompt) > _LONG_TEXT:
            import asyncio  # Not at the top, see async_stream.py.

            made, messages = await asyncio.to_thread(self._ask, prompt, given)
        else:
            made, messages = self._ask(prompt, given)
        _tell(messages)
        return made

    def _ask(self, prompt: str | list[int], given: dict[str, Any]) -> tuple[_core.Request, list[str]]:
        return self._core.request(prompt, given, False), self._core.take_warnings()

    async def _whole(self, request: _core.Request, given: dict[str, Any]) -> Completion:
        # Before another task has its turn, so that it does not get this one's warnings.
        stream, messages = self._core.start(request), self._core.take_warnings()
        _tell(messages)
        return await async_stream.whole(stream, given)

    def _chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template: str | None,
        template_variables: Mapping[str, Any] | None,
    ) -> tuple[list[int], bool]:
        """Returns the prompt, and whether the answer is a text of its own, not the end of a message."""
        variables = dict(template_variables or {})
        variables.pop("tokenize", None)
        ids = self.tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tools=tools, tokenize=True, **variables
        )
        return ids, not variables.get("continue_final_message", False)

    def _warn(self) -> None:
        """Passes on warnings about the prompts of this thread, as of the caller's caller."""
        _tell(self._core.take_warnings())


def _tell(messages: list[str]) -> None:
    """Gives warnings as of the caller's caller's caller."""
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=4)


def _reload(source: str, options: dict[str, Any]) -> Llama:
    return load(source, **options)


def _is_batch(prompt: object) -> TypeGuard[Sequence[Any]]:
    """Returns whether `prompt` is a list of prompts; a flat list of ints is a single prompt."""
    return isinstance(prompt, list | tuple) and not any(isinstance(item, int | np.integer) for item in prompt)


def _one_prompt(prompt: Any, method: str) -> str | list[int]:
    if _is_batch(prompt):
        raise TypeError(f"{method} takes one prompt, not a list; generate takes lists")
    return _prompt(prompt, "prompt")


def _prompt(prompt: Any, name: str) -> str | list[int]:
    if isinstance(prompt, str):
        check_text(prompt, name)
        return prompt
    if isinstance(prompt, list | tuple) or hasattr(prompt, "dtype") or hasattr(prompt, "__array__"):
        return checked_token_ids(prompt, name)
    hint = ""
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        hint = '; pass its "input_ids"'
    elif "role" in prompt if isinstance(prompt, Mapping) else hasattr(prompt, "role"):
        hint = ", which looks like a message: llm.chat(messages) and llm.stream_chat(messages) take messages"
    elif isinstance(prompt, bytes | bytearray):
        hint = "; decode it first, as in prompt.decode()"
    raise TypeError(f"{name} must be a str or a list of token ids, not {type(prompt).__name__}{hint}")


def _load_report(fields: dict[str, Any]) -> LoadReport:
    storage = {name: StorageType(**size) for name, size in fields["storage"].items()}
    return LoadReport(**{**fields, "storage": storage})
