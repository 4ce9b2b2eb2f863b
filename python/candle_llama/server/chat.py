"""POST /v1/chat/completions."""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from candle_llama.async_stream import AsyncStream
from candle_llama.server import body as bodies
from candle_llama.server import constraints, conversation, engine, errors, logprobs, options
from candle_llama.server.errors import JsonResponse
from candle_llama.server.schema import ChatRequest
from candle_llama.server.state import State
from candle_llama.server.streaming import EventStream, event
from candle_llama.server.tools import CallArguments, CallStart, Event, Text, ToolParser
from candle_llama.server.usage import Usage
from candle_llama.types import Chunk, Completion, Stats


async def create(state: State, request: Request) -> Response:
    """Answers a conversation."""
    body, size = await bodies.read(request, ChatRequest, state.limits)
    state.check_ready()
    state.check_model(body.model)
    answers = Answers(state, body)
    n = body.n or 1
    with state.queue.enter(n) as places:
        streams = await engine.start(state, answers.begin, size * n, answers.fields)
        if body.stream:
            # The stream leaves the queue at its end.
            return EventStream(state, answers.events(streams), places.pop_all().close)
        completions = await state.run(request.receive, engine.whole(streams))
        return JsonResponse(answers.whole(completions))


class Answers:
    """The answers to a request: how they are started, and how they are written.

    Attributes:
        fields: The fields of the request that the engine knows by other names.

    Raises:
        ApiError: A combination of fields is refused.
    """

    def __init__(self, state: State, body: ChatRequest) -> None:
        self._state = state
        self._body = body
        self._started = time.monotonic()
        self._head = {
            "id": "chatcmpl-" + secrets.token_hex(12),
            "created": int(time.time()),
            "model": state.name,
        }
        if body.top_logprobs and not body.logprobs:
            raise errors.refused("top_logprobs", "needs logprobs to be true")
        # First, because there are parameters for each answer.
        state.limits.check_choices(1, body.n or 1)
        limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        if body.max_completion_tokens not in (None, limit):
            raise errors.refused("max_tokens", "differs from max_completion_tokens, its newer name")
        constraint = constraints.constraint(body)
        self.fields = constraint.fields
        count = (body.top_logprobs or 0) if body.logprobs else None
        given = options.sampling(body, limit or -1, count)
        self._is_call = bool(constraints.demanded(body))
        allowed = constraints.allowed(body)
        self._has_tools = bool(allowed)
        if self._has_tools:
            # Some models mark a call with a special token.
            given["skip_special_tokens"] = False
        self._messages = conversation.messages(body.messages)
        self._tools = conversation.tools(allowed) if self._has_tools else None
        self._variables = conversation.variables(body.chat_template_kwargs)
        self._names = {tool.function.name for tool in allowed}
        self._given = [{**one, **constraint.given} for one in options.for_answers(body, given)]

    def begin(self) -> list[AsyncStream]:
        """Starts all answers."""
        llm = self._state.llm
        has_tools = self._tools is not None
        variables = conversation.read_variables(llm.tokenizer, self._variables, has_tools)
        tools = conversation.read_tools(llm.tokenizer, self._tools)
        if self._state.limits.max_prompt_tokens is not None:
            ids = llm.tokenizer.apply_chat_template(self._messages, tools=tools, tokenize=True, **variables)
            self._state.limits.check_prompt(len(ids))
        # The template is rendered for each answer, which is cheap; the prefix cache shares the rest.
        return [
            llm.astream_chat(self._messages, tools=tools, template_variables=variables, **given)
            for given in self._given
        ]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Returns the response that is not streamed."""
        usage = Usage()
        choices = []
        for index, completion in enumerate(completions):
            usage.add(completion.stats, index == 0)
            message, reason = self._message(completion)
            self.count(reason, completion.stats)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self.logprobs(completion),
                    "finish_reason": reason,
                }
            )
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage.form()}

    async def events(self, streams: Sequence[AsyncStream]) -> AsyncGenerator[bytes]:
        """Yields the events of the answers, as they are generated."""
        usage = Usage()
        writers = [_Writer(index, self) for index in range(len(streams))]
        for writer in writers:
            yield self._event(writer.choice({"role": "assistant", "content": ""}))
        async with contextlib.aclosing(engine.pieces(self._state, streams)) as pieces:
            async for index, chunk in pieces:
                if chunk.stats is not None:
                    usage.add(chunk.stats, index == 0)
                for choice in writers[index].read(chunk):
                    yield self._event(choice)
        if self._wants_usage:
            last = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.form()}
            yield event(last)

    @property
    def _wants_usage(self) -> bool:
        stream_options = self._body.stream_options
        return bool(stream_options and stream_options.include_usage)

    def parser(self) -> ToolParser | None:
        """Returns what finds calls in an answer; None if there are no functions to call."""
        if not self._has_tools:
            return None
        most = 1 if self._body.parallel_tool_calls is False else None
        return ToolParser(self._names, most, is_demanded=self._is_call)

    def _event(self, choice: dict[str, Any]) -> bytes:
        content = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._wants_usage:
            content["usage"] = None
        return event(content)

    def _message(self, completion: Completion) -> tuple[dict[str, Any], str]:
        reason = finish_reason(completion.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        if parser := self.parser():
            text, calls = joined([*parser.feed(completion.text), *parser.finish()])
            message["content"] = text or (None if calls or self._is_call else "")
            if calls:
                message["tool_calls"] = calls
                reason = "tool_calls" if reason == "stop" or parser.is_done else reason
        return message, reason

    def logprobs(self, answer: Completion | Chunk) -> dict[str, Any] | None:
        """Returns the log-probabilities of an answer or a piece of it, if they are asked for."""
        if answer.logprobs is None:
            return None
        return {"content": logprobs.chat(answer.logprobs, self._state.token_texts), "refusal": None}

    def count(self, reason: str, stats: Stats | None) -> None:
        """Counts an answer that has ended."""
        self._state.metrics.answer(reason, stats, time.monotonic() - self._started)


class _Writer:
    """Writes one answer of a stream."""

    def __init__(self, index: int, answers: Answers) -> None:
        self._index = index
        self._answers = answers
        self._parser = answers.parser()
        # Those of tokens whose text is still held back.
        self._logprobs: list[dict[str, Any]] = []

    def read(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Returns the choices of the next events."""
        if chunk.logprobs:
            found = self._answers.logprobs(chunk)
            self._logprobs += found["content"] if found else []
        parser = self._parser
        deltas: list[dict[str, Any]]
        if parser is None:
            deltas = [{"content": chunk.text}] if chunk.text else []
        else:
            events = parser.feed(chunk.text)
            if chunk.finish_reason is not None:
                events += parser.finish()
            deltas = [_delta(one) for one in events]
        choices = [self.choice(delta) for delta in deltas]
        if chunk.finish_reason is not None:
            reason = finish_reason(chunk.finish_reason)
            if parser is not None and parser.calls and (reason == "stop" or parser.is_done):
                reason = "tool_calls"
            choices.append(self.choice({}, reason))
            self._answers.count(reason, chunk.stats)
        return choices

    def choice(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        """Returns the choice of an event."""
        found = {"content": self._logprobs, "refusal": None} if self._logprobs else None
        self._logprobs = []
        return {"index": self._index, "delta": delta, "logprobs": found, "finish_reason": reason}


def finish_reason(reason: str) -> str:
    """Returns OpenAI's word; the server sets no timeout, and cancels nothing that it answers."""
    return "stop" if reason == "stop" else "length"


def joined(events: Sequence[Event]) -> tuple[str, list[dict[str, Any]]]:
    """Returns the text and the calls of an answer."""
    text = ""
    calls: list[dict[str, Any]] = []
    for one in events:
        match one:
            case Text():
                text += one.text
            case CallStart():
                function = {"name": one.name, "arguments": ""}
                calls.append({"id": one.id, "type": "function", "function": function})
            case CallArguments():
                calls[one.index]["function"]["arguments"] += one.text
    return text, calls


def _delta(one: Event) -> dict[str, Any]:
    match one:
        case Text():
            return {"content": one.text}
        case CallStart():
            function = {"name": one.name, "arguments": ""}
            call = {"index": one.index, "id": one.id, "type": "function", "function": function}
        case CallArguments():
            call = {"index": one.index, "function": {"arguments": one.text}}
    return {"tool_calls": [call]}
