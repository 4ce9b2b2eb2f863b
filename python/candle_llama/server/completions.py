"""POST /v1/completions."""

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from candle_llama import _core
from candle_llama.async_stream import AsyncStream
from candle_llama.llama import Llama
from candle_llama.server import body as bodies
from candle_llama.server import constraints, engine, errors, logprobs, options
from candle_llama.server.chat import finish_reason
from candle_llama.server.errors import JsonResponse
from candle_llama.server.schema import CompletionRequest
from candle_llama.server.state import State
from candle_llama.server.streaming import EventStream, event
from candle_llama.server.usage import Usage
from candle_llama.types import Chunk, Completion

# OpenAI's.
_DEFAULT_MAX_TOKENS = 16

_Scored = list[tuple[int, float | None, list[tuple[int, float]]]]


async def create(state: State, request: Request) -> Response:
    """Continues one or several texts."""
    body, size = await bodies.read(request, CompletionRequest, state.limits)
    state.check_ready()
    state.check_model(body.model)
    answers = Answers(state, body)
    count = len(answers.prompts) * (body.n or 1)
    with state.queue.enter(count) as places:
        streams = await engine.start(state, answers.begin, size * (body.n or 1), answers.fields)
        if body.stream:
            # The stream leaves the queue at its end.
            return EventStream(state, answers.events(streams), places.pop_all().close)
        return JsonResponse(await state.run(request.receive, answers.whole(streams)))


class Answers:
    """The answers to a request: how they are started, and how they are written.

    Attributes:
        prompts: The prompts, as text or token ids.
        fields: The fields of the request that the engine knows by other names.

    Raises:
        ApiError: A combination of fields is refused.
    """

    def __init__(self, state: State, body: CompletionRequest) -> None:
        self._state = state
        self._body = body
        self._started = time.monotonic()
        self._head = {
            "id": "cmpl-" + secrets.token_hex(12),
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.name,
        }
        limit = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if limit == 0 and not body.echo:
            raise errors.refused("max_tokens", "0 needs echo")
        self._generates = limit > 0
        self.prompts = _prompts(body.prompt)
        # First, because there are parameters for each answer.
        state.limits.check_choices(len(self.prompts), body.n or 1)
        given = options.sampling(body, limit or 1, body.logprobs)
        constraint = constraints.constraint(body)
        self.fields = constraint.fields
        self._given = [{**one, **constraint.given} for one in options.for_answers(body, given)]
        self._ids: list[list[int]] = []

    def begin(self) -> list[AsyncStream]:
        """Reads the prompts, and starts all answers: those to the first prompt come first."""
        llm = self._state.llm
        for index, prompt in enumerate(self.prompts):
            ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            if not ids:
                raise errors.refused("prompt", f"prompt {index} has no tokens")
            self._state.limits.check_prompt(len(ids))
            self._ids.append(ids)
        if not self._generates:
            return []
        return [llm.astream(ids, **given) for ids in self._ids for given in self._given]

    async def whole(self, streams: Sequence[AsyncStream]) -> dict[str, Any]:
        """Returns the response that is not streamed."""
        scored = await self._scored()
        completions = await engine.whole(streams)
        usage = self._usage()
        choices = []
        for index, writer in enumerate(self._writers(scored)):
            if not self._generates:
                choices.append(writer.choice("", None, "length"))
                continue
            completion = completions[index]
            usage.add(completion.stats, index % len(self._given) == 0)
            reason = finish_reason(completion.finish_reason)
            self._count(reason, completion)
            choices.append(writer.choice(completion.text, completion, reason))
        return {**self._head, "choices": choices, "usage": usage.form()}

    async def events(self, streams: Sequence[AsyncStream]) -> AsyncGenerator[bytes]:
        """Yields the events of the answers, as they are generated."""
        n = len(self._given)
        usage = self._usage()
        writers = self._writers(await self._scored())
        if self._body.echo:
            for writer in writers:
                yield self._event(writer.choice("", None, None if self._generates else "length"))
        async with contextlib.aclosing(engine.pieces(self._state, streams)) as pieces:
            async for index, chunk in pieces:
                if chunk.stats is not None:
                    usage.add(chunk.stats, index % n == 0)
                reason = None if chunk.finish_reason is None else finish_reason(chunk.finish_reason)
                if reason is not None:
                    self._count(reason, chunk)
                if chunk.text or chunk.logprobs or reason:
                    yield self._event(writers[index].choice(chunk.text, chunk, reason))
        if self._wants_usage:
            yield event({**self._head, "choices": [], "usage": usage.form()})

    def _usage(self) -> Usage:
        """Returns the count to which answers are added; a prompt without an answer counts at once."""
        return Usage() if self._generates else Usage(prompt=sum(map(len, self._ids)))

    def _writers(self, scored: Sequence[_Scored | None]) -> list["_Writer"]:
        writers = []
        for index in range(len(self.prompts) * len(self._given)):
            prompt = index // len(self._given)
            form = None
            if self._body.logprobs is not None:
                form = logprobs.Completions(self._state.token_texts, self._ids[prompt])
            writers.append(_Writer(index, form, self._echo(prompt), scored[prompt]))
        return writers

    @property
    def _wants_usage(self) -> bool:
        stream_options = self._body.stream_options
        return bool(stream_options and stream_options.include_usage)

    def _event(self, choice: dict[str, Any]) -> bytes:
        content = {**self._head, "choices": [choice]}
        if self._wants_usage:
            content["usage"] = None
        return event(content)

    def _echo(self, prompt: int) -> str:
        if not self._body.echo:
            return ""
        given = self.prompts[prompt]
        return given if isinstance(given, str) else self._state.llm.tokenizer.decode(given, False)

    async def _scored(self) -> list[_Scored | None]:
        """Returns the log-probabilities of the prompts' tokens, if they are asked for."""
        if not self._body.echo or self._body.logprobs is None:
            return [None] * len(self.prompts)
        scored: list[_Scored | None] = []
        loop, state = asyncio.get_running_loop(), self._state
        for ids in self._ids:
            cancellation = _core.Cancellation()
            work = functools.partial(score, state.llm, ids, self._body.logprobs, cancellation)
            try:
                found = await loop.run_in_executor(state.scorer, work)
            except asyncio.CancelledError:
                # The thread would go on scoring for nobody.
                cancellation.cancel()
                raise
            except (ValueError, TypeError) as error:
                state.check_ready()
                raise errors.of_request(error) from None
            scored.append(found)
        return scored

    def _count(self, reason: str, answer: Completion | Chunk) -> None:
        self._state.metrics.answer(reason, answer.stats, time.monotonic() - self._started)


class _Writer:
    """Writes one choice, in one piece or in several; the prompt comes first, if it is echoed."""

    def __init__(
        self, index: int, form: logprobs.Completions | None, echo: str, scored: _Scored | None
    ) -> None:
        self._index = index
        self._form = form
        self._echo = echo
        self._echoed = form.add_echoed(scored or [], echo) if form is not None else {}

    def choice(self, text: str, answer: Completion | Chunk | None, reason: str | None) -> dict[str, Any]:
        """Returns a choice, or the next piece of it."""
        found = None
        if self._form is not None:
            new = self._form.add_chosen(answer.logprobs or [] if answer is not None else [])
            found = {name: self._echoed.get(name, []) + values for name, values in new.items()}
        text = self._echo + text
        self._echo, self._echoed = "", {}
        return {"index": self._index, "text": text, "logprobs": found, "finish_reason": reason}


def _prompts(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise errors.refused("prompt", "empty")
    ids = [one for one in given if isinstance(one, int)]
    return [ids] if ids else [one for one in given if not isinstance(one, int)]


def score(llm: Llama, ids: list[int], count: int, cancellation: _core.Cancellation) -> _Scored:
    """Returns each token's log-probability and the likeliest `count` tokens at its place.

    The first token has none. With `count` above 0, all logits are in memory at once. Another thread may
    cancel it.
    """
    if len(ids) == 1:
        return [(ids[0], None, [])]
    if count == 0:
        found = llm._core.score(ids, cancellation)
        return [(token, value, []) for token, value in zip(ids, found["logprobs"], strict=True)]
    scored: _Scored = [(ids[0], None, [])]
    rows = llm._logits(ids[:-1], None, cancellation)
    for token, row in zip(ids[1:], rows, strict=True):
        values = row.astype(np.float64)
        values -= values.max()
        values -= np.log(np.exp(values).sum())
        best = np.argpartition(values, -count)[-count:]
        best = best[np.argsort(-values[best], kind="stable")]
        scored.append((token, float(values[token]), [(int(one), float(values[one])) for one in best]))
    return scored
