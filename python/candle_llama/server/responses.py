"""POST /v1/responses: the part of OpenAI's Responses API that needs no memory of earlier requests."""

import contextlib
import re
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from candle_llama.async_stream import AsyncStream
from candle_llama.server import body as bodies
from candle_llama.server import chat, engine, errors
from candle_llama.server.errors import ApiError, JsonResponse
from candle_llama.server.response_output import Output
from candle_llama.server.schema import (
    ChatRequest,
    FlatAllowedTools,
    FlatNamedTool,
    Function,
    InputCall,
    InputMessage,
    InputResult,
    InputText,
    ResponsesRequest,
)
from candle_llama.server.state import State
from candle_llama.server.streaming import EventStream, named_event
from candle_llama.server.tools import Event, Text
from candle_llama.types import Completion, Stats

_OUR_NAMES = (
    (r"response_format(\.json_schema)?\b", "text.format"),
    (r"max_tokens\b", "max_output_tokens"),
    (r"(messages|prompt)\b", "input"),
    (r"(tools\.\d+)\.function\b", r"\1"),
)
"""Patterns of fields of chat completions, and what they are here."""
_SAME = ("temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty", "cache_salt")


async def create(state: State, request: Request) -> Response:
    """Answers a conversation."""
    body, size = await bodies.read(request, ResponsesRequest, state.limits)
    state.check_ready()
    state.check_model(body.model)
    try:
        answer = Answer(state, body)
        with state.queue.enter(1) as places:
            streams = await engine.start(state, answer.begin, size, answer.fields)
            if body.stream:
                # The stream leaves the queue at its end. These streams have no [DONE].
                leave = places.pop_all().close
                return EventStream(state, answer.events(streams), leave, b"", answer.failed)
            (completion,) = await state.run(request.receive, engine.whole(streams))
            return JsonResponse(answer.whole(completion))
    except ApiError as error:
        if theirs := error.param:
            for pattern, ours in _OUR_NAMES:
                error.param = re.sub(rf"^{pattern}", ours, error.param)
            if re.match(rf"{re.escape(theirs)}(:| is )", error.message):
                error.message = error.param + error.message.removeprefix(theirs)
        raise


class Answer:
    """The answer to a request: how it is started, and how it is written.

    Attributes:
        fields: The fields of the request that the engine knows by other names.

    Raises:
        ApiError: A combination of fields is refused.
    """

    def __init__(self, state: State, body: ResponsesRequest) -> None:
        self._body = body
        self._chat = chat.Answers(state, _chat_request(body))
        self.fields = self._chat.fields
        self._parser = self._chat.parser()
        self._state = state
        self._output = Output()
        self._response: dict[str, Any] = {
            "id": "resp_" + secrets.token_hex(12),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": state.name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {
                "format": _dump(body.text.format) if body.text and body.text.format else {"type": "text"}
            },
            "tool_choice": _dump(body.tool_choice) or "auto",
            "tools": [_dump(tool) for tool in body.tools or []],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def begin(self) -> list[AsyncStream]:
        """Starts the answer."""
        return self._chat.begin()

    def whole(self, completion: Completion) -> dict[str, Any]:
        """Returns the response that is not streamed."""
        self._read(completion.text, completion.finish_reason)
        self._end(completion.finish_reason, completion.stats)
        self._chat.count(completion.finish_reason, completion.stats)
        return self._response

    async def events(self, streams: Sequence[AsyncStream]) -> AsyncGenerator[bytes]:
        """Yields the events of the answer, as it is generated."""
        yield self._event({"type": "response.created", "response": self._response})
        yield self._event({"type": "response.in_progress", "response": self._response})
        async with contextlib.aclosing(engine.pieces(self._state, streams)) as pieces:
            async for _, chunk in pieces:
                for one in self._read(chunk.text, chunk.finish_reason):
                    yield self._event(one)
                if chunk.finish_reason is not None and chunk.stats is not None:
                    self._end(chunk.finish_reason, chunk.stats)
                    self._chat.count(chunk.finish_reason, chunk.stats)
        yield self._event({"type": f"response.{self._response['status']}", "response": self._response})

    def failed(self, error: ApiError) -> bytes:
        """Returns the event of an error."""
        facts = {"code": "server_error", "message": error.message}
        self._response |= {"status": "failed", "error": facts, "output": self._output.items}
        return self._event({"type": "response.failed", "response": self._response})

    def _read(self, text: str, reason: str | None) -> list[dict[str, Any]]:
        found: list[Event] = [Text(text)] if text else []
        if (parser := self._parser) is not None:
            found = [*parser.feed(text), *(parser.finish() if reason is not None else [])]
        return self._output.read(found, None if reason is None else _status(reason))

    def _end(self, reason: str, stats: Stats) -> None:
        status = _status(reason)
        self._response |= {
            "status": status,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "output": self._output.items,
            "usage": {
                "input_tokens": stats.prompt_tokens,
                "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": stats.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": stats.prompt_tokens + stats.completion_tokens,
            },
        }

    def _event(self, content: dict[str, Any]) -> bytes:
        return named_event({**content, "sequence_number": self._output.next_number()})


def _status(reason: str) -> str:
    return "completed" if chat.finish_reason(reason) == "stop" else "incomplete"


def _dump(value: Any) -> Any:
    return value.model_dump(by_alias=True) if hasattr(value, "model_dump") else value


def _chat_request(body: ResponsesRequest) -> ChatRequest:
    """Returns the request for a chat that asks for the same."""
    content: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    content |= {
        "messages": _messages(body),
        "max_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
        "tool_choice": body.tool_choice,
    }
    match body.tool_choice:
        case FlatNamedTool() as named:
            content["tool_choice"] = _named(named)
        case FlatAllowedTools(mode=mode, tools=tools):
            allowed = {"mode": mode, "tools": [_named(tool) for tool in tools]}
            content["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
    if body.tools:
        content["tools"] = [
            {"type": "function", "function": tool.model_dump(include=set(Function.model_fields))}
            for tool in body.tools
        ]
    if body.text and (form := body.text.format):
        content["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            schema = {"name": form.name, "schema": form.schema_, "strict": form.strict}
            content["response_format"]["json_schema"] = schema
    return bodies.checked(content, ChatRequest)


def _named(tool: FlatNamedTool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    if body.instructions:
        turns.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*turns, {"role": "user", "content": body.input}]
    for item in body.input:
        match item:
            case InputMessage():
                turns.append({"role": item.role, "content": _text(item.content)})
            case InputCall():
                # Text and calls of one answer are one turn.
                if not turns or turns[-1]["role"] != "assistant":
                    turns.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                turns[-1].setdefault("tool_calls", []).append(call)
            case InputResult():
                text = _text(item.output)
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
    if not turns:
        raise errors.refused("input", "there is no message")
    return turns


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
