"""The application: its routes, and how errors become responses."""

import functools
import os
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from candle_llama import __version__
from candle_llama.errors import CandleLlamaError
from candle_llama.llama import Llama
from candle_llama.server import chat, completions, errors, models, page, responses, tokens
from candle_llama.server.access import Access
from candle_llama.server.errors import ApiError, JsonResponse
from candle_llama.server.limits import Limits, Queue
from candle_llama.server.metrics import Metrics
from candle_llama.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    Strict,
    TokenizeRequest,
)
from candle_llama.server.state import DisconnectedError, State

_REF = "#/components/schemas/{model}"
_OBJECT: dict[str, Any] = {"schema": {"type": "object"}}
_ERROR = {"description": "OpenAI's error object", "content": {"application/json": _OBJECT}}
# A client that is gone reads no status; the log shows it.
_CLIENT_GONE = 499

_Post = Callable[[State, Request], Awaitable[Response]]
_POSTS: dict[str, tuple[_Post, type[Strict], str]] = {
    "/v1/chat/completions": (chat.create, ChatRequest, "Answer a conversation"),
    "/v1/completions": (completions.create, CompletionRequest, "Continue a text"),
    "/v1/responses": (responses.create, ResponsesRequest, "Answer a conversation (Responses API)"),
    "/tokenize": (tokens.tokenize, TokenizeRequest, "Convert a text or a conversation to token ids"),
    "/detokenize": (tokens.detokenize, DetokenizeRequest, "Convert token ids to text"),
}


def build_app(
    llm: Llama,
    *,
    api_key: str | None = None,
    served_model_name: str | None = None,
    max_body_bytes: int = 16 * 1024**2,
    max_prompt_tokens: int | None = None,
    max_choices: int = 128,
    max_queue: int = 256,
    allowed_hosts: Collection[str] | None = None,
) -> FastAPI:
    """Makes a server with OpenAI's interface, for a model that is loaded; it needs the extra `server`.

    Run it with uvicorn, or mount it in an application of your own. Closing the model is up to the caller.

    Args:
        llm: The model.
        api_key: The key that clients must send, without white space around it; None lets everybody in.
        served_model_name: The model's name for clients; None is its hub id, file or folder.
        max_body_bytes: Most bytes of a request's body.
        max_prompt_tokens: Most tokens of a prompt; None allows as many as the context holds.
        max_choices: Most answers to one prompt (`n`).
        max_queue: Most answers that run or wait; further requests get status 429.
        allowed_hosts: The host names by which clients may call the server, without ports; None allows all.

    Returns:
        The application. Its attribute `state.server` is what `serve` shuts down.

    Raises:
        ValueError: The key is empty, or a limit is not a positive int.
        FileNotFoundError: The model has no tokenizer.

    Example:
        >>> import candle_llama
        >>> from candle_llama.server import build_app
        >>> app = build_app(candle_llama.load("demo"), served_model_name="smol")
        >>> app.state.server.name
        'smol'
    """
    if api_key is not None and not api_key.strip():
        raise ValueError("api_key is empty; None lets everybody in")
    # Without a tokenizer nothing could be answered, so that is an error here.
    _ = llm.tokenizer
    limits = Limits(max_body_bytes, max_prompt_tokens, max_choices, max_queue)
    name = served_model_name or _name(llm)
    state = State(llm, name, int(time.time()), limits, Queue(limits), Metrics(llm, name))
    app = FastAPI(title="candle-llama", version=__version__, description="OpenAI's interface to a Llama.")
    app.state.server = state
    for path, (create, kind, summary) in _POSTS.items():
        _add_post(app, state, path, create, kind, summary)
    _add_gets(app, state)
    _add_heads(app)
    _add_errors(app, state)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    hosts = None if allowed_hosts is None else frozenset(host.lower() for host in allowed_hosts)
    app.add_middleware(Access, api_key=api_key, metrics=state.metrics, paths=paths, hosts=hosts)
    _describe(app)
    return app


def _name(llm: Llama) -> str:
    """Returns the model's name for clients, who need not know the server's folders."""
    source = llm._source
    is_path = source.startswith((".", "~")) or os.path.isabs(source) or source.endswith(".gguf")
    return Path(source).name or "model" if is_path else source


def _add_post(app: FastAPI, state: State, path: str, create: _Post, kind: type[Strict], summary: str) -> None:
    async def endpoint(request: Request) -> Response:
        return await create(state, request)

    schema = {"$ref": _REF.format(model=kind.__name__)}
    content = {"required": True, "content": {"application/json": {"schema": schema}}}
    app.post(
        path,
        summary=summary,
        response_class=JsonResponse,
        responses=_responses("stream" in kind.model_fields),
        openapi_extra={"requestBody": content},
        operation_id=kind.__name__,
    )(endpoint)


def _responses(streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """Describes what a route answers."""
    events: dict[str, Any] = {"text/event-stream": {}} if streams else {}
    return {200: {"content": {"application/json": _OBJECT, **events}}, "default": _ERROR}


def _add_gets(app: FastAPI, state: State) -> None:
    get = functools.partial(app.get, response_class=JsonResponse, responses=_responses())

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return page.response()

    @get("/v1/models", summary="List the model")
    async def list_models() -> Response:
        return JsonResponse(models.listed(state))

    @get("/v1/models/{name:path}", summary="Describe the model")
    async def one_model(name: str) -> Response:
        return JsonResponse(models.one(state, name))

    @get("/tokenizer_info", summary="Describe the tokenizer")
    async def tokenizer_info() -> Response:
        return JsonResponse(tokens.info(state))

    @get("/health", summary="Say whether requests can be answered")
    async def health() -> Response:
        state.check_ready()
        return JsonResponse({"status": "ok"})

    @app.get("/metrics", summary="Counts, for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_heads(app: FastAPI) -> None:
    """Answers HEAD as GET, for monitors; HTTP servers leave the body out."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


def _add_errors(app: FastAPI, state: State) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return errors.response(error)

    @app.exception_handler(CandleLlamaError)
    async def engine_error(request: Request, error: CandleLlamaError) -> Response:
        state.note(error)
        return errors.response(errors.of_engine(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {errors.shown(request.url.path)}"
        return errors.response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(DisconnectedError)
    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> Response:
        return errors.response(errors.of_engine(error))


def _describe(app: FastAPI) -> None:
    """Adds the requests' fields to the OpenAPI description: the routes read their bodies themselves."""
    _, found = models_json_schema([(kind, "validation") for _, kind, _ in _POSTS.values()], ref_template=_REF)
    original = app.openapi

    def openapi() -> dict[str, Any]:
        description = original()
        description.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
        return description

    app.openapi = openapi  # type: ignore[method-assign]
