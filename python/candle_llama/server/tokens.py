"""POST /tokenize, POST /detokenize and GET /tokenizer_info, with vLLM's fields."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request

from candle_llama.server import body as bodies
from candle_llama.server import conversation, errors
from candle_llama.server.errors import JsonResponse
from candle_llama.server.schema import DetokenizeRequest, TokenizeRequest
from candle_llama.server.state import State

_T = TypeVar("_T")


async def tokenize(state: State, request: Request) -> JsonResponse:
    """Returns the token ids of a text or a conversation."""
    body, _ = await bodies.read(request, TokenizeRequest, state.limits)
    state.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise errors.refused("prompt", "give either prompt or messages")
    ids = await _in_thread(lambda: _ids(state, body))
    content: dict[str, Any] = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": state.llm.config.context_length,
    }
    return JsonResponse(content)


async def detokenize(state: State, request: Request) -> JsonResponse:
    """Returns the text of token ids, special tokens included."""
    body, _ = await bodies.read(request, DetokenizeRequest, state.limits)
    state.check_model(body.model)
    text = await _in_thread(lambda: state.llm.tokenizer.decode(body.tokens, False), {"ids": "tokens"})
    return JsonResponse({"prompt": text})


def info(state: State) -> dict[str, Any]:
    """Returns what a client needs that writes chats itself, as lm-eval's does."""
    tokenizer = state.llm.tokenizer
    names = {"bos_token": None, "eos_token": None, **tokenizer._core.special_tokens}
    return {**names, "chat_template": tokenizer.chat_template}


def _ids(state: State, body: TokenizeRequest) -> list[int]:
    tokenizer = state.llm.tokenizer
    if body.messages is None:
        return tokenizer.encode(body.prompt or "", body.add_special_tokens)
    given = conversation.variables(body.chat_template_kwargs)
    variables = conversation.read_variables(tokenizer, given, bool(body.tools))
    return tokenizer.apply_chat_template(
        conversation.messages(body.messages),
        tools=conversation.read_tools(tokenizer, conversation.tools(body.tools or [])),
        tokenize=True,
        **{"add_generation_prompt": body.add_generation_prompt, **variables},
    )


async def _in_thread(work: Callable[[], _T], fields: Mapping[str, str] | None = None) -> _T:
    """Does what a client may make slow, without stopping the event loop."""
    try:
        return await asyncio.to_thread(work)
    except (ValueError, TypeError) as error:
        raise errors.of_request(error, fields) from None
