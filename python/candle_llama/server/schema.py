"""The requests' fields, by OpenAI's names, and which others are ignored or refused.

Each field of OpenAI's that is missing in a model is a key of its `IGNORED` or `REFUSED`. Every other field
is an error.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

_NO_TOOLS_OF_ITS_OWN = "this server has no tools of its own; describe functions in tools"
_HARMLESS = "no effect: it concerns OpenAI's service"
_MAX_ENTRIES = 10_000

_T = TypeVar("_T")


def _few(content: Any) -> Any:
    # Checked before the entries: each wrong one takes time and memory.
    if isinstance(content, dict) and len(content) > _MAX_ENTRIES:
        facts = {"count": len(content), "limit": _MAX_ENTRIES}
        raise PydanticCustomError("too_many", "got {count} entries, this server accepts {limit}", facts)
    return content


# Pydantic reports every wrong item of a list, which takes kilobytes and microseconds each, and clients send
# millions. Every list that a client sends stops at its first wrong item instead.
Items: TypeAlias = Annotated[list[_T], Field(fail_fast=True)]
Table: TypeAlias = Annotated[dict[str, _T], BeforeValidator(_few)]
Count: TypeAlias = Annotated[int, Field(ge=1, lt=2**31)]
Bias: TypeAlias = Table[float]
Stop: TypeAlias = str | Items[str]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**32)]


class Strict(BaseModel):
    """JSON with exactly these fields and types."""

    # Strict: the text "1" is no number, and 1.5 is no int.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    IGNORED: ClassVar[dict[str, str]] = {}
    REFUSED: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, content: Any) -> Any:
        # Pydantic reports every unknown field. There may be a million; one is enough.
        if isinstance(content, dict) and len(content) > len(cls.model_fields):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = next(name for name in content if name not in known)
            return {unknown: content[unknown]}
        return content


class StreamOptions(Strict):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Strict):
    """The fields that say how to generate; those from `top_k` on are extensions."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: Bias | None = None
    n: Count | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Items[int] | None = None
    cache_salt: str | None = None
    regex: str | None = None
    grammar: str | None = None


def _is_text(kind: str) -> bool:
    return "text" in kind.split("_")


def _read_kind(kind: Any) -> Any:
    if isinstance(kind, str) and not _is_text(kind):
        raise PydanticCustomError(
            "literal_error", "{kind}; this server reads text only", {"kind": kind[:100]}
        )
    return kind


class Part(Strict):
    """What parts of messages have in common: the hints, which change no answer."""

    prompt_cache_breakpoint: Any = None
    cache_control: Any = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, part: Any) -> Any:
        match part:
            case {"type": "refusal", "refusal": refusal, **rest}:
                return {**rest, "type": "text", "text": refusal}
            case {"type": str(kind)} if not _is_text(kind):
                # Without its other fields, for the error is about the type.
                return {"type": kind}
        return part


class TextPart(Part):
    """A part of a message."""

    type: Annotated[Literal["text"], BeforeValidator(_read_kind)]
    text: str


class FunctionCall(Strict):
    """The function that a call names, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # Answers are sent back with these.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function, in OpenAI's envelope."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """Demands a call of this function."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    """The functions that may be called, or must be."""

    mode: Literal["auto", "required"]
    tools: Items[NamedTool]


class AllowedToolChoice(Strict):
    """Hides all functions but these."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice(choice: Any) -> str:
    # Errors are then about the kind that the client means.
    is_list = isinstance(choice, dict) and choice.get("type") == "allowed_tools"
    return "Allowed" if is_list else "Named"


ToolMode: TypeAlias = Literal["none", "auto", "required"]
ToolChoice: TypeAlias = Annotated[
    Annotated[NamedTool, Tag("Named")] | Annotated[AllowedToolChoice, Tag("Allowed")], Discriminator(_choice)
]


class JsonSchema(Strict):
    """A JSON schema for the answer."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    tool_choice: ToolMode | ToolChoice | None = None
    tools: Items[Tool] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    IGNORED: ClassVar[dict[str, str]] = {
        "metadata": _HARMLESS,
        "prediction": "a hint for speed, which changes no answer",
        "prompt_cache_key": "equal beginnings of prompts are found by their tokens; see cache_salt",
        "prompt_cache_options": "as prompt_cache_key",
        "prompt_cache_retention": "as prompt_cache_key",
        "reasoning_effort": "Llama models have no such setting; see chat_template_kwargs",
        "safety_identifier": _HARMLESS,
        "service_tier": _HARMLESS,
        "store": "nothing is stored",
        "user": _HARMLESS,
        "verbosity": "Llama models have no such setting",
    }
    REFUSED: ClassVar[dict[str, str]] = {
        "audio": "this server writes text only",
        "function_call": "deprecated by OpenAI; use tool_choice",
        "functions": "deprecated by OpenAI; use tools",
        "modalities": 'this server writes text only: leave it out, or give ["text"]',
        "moderation": "this server does not moderate",
        "web_search_options": _NO_TOOLS_OF_ITS_OWN,
    }


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: str | Items[TokenId] | Items[str] | Items[Items[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    IGNORED: ClassVar[dict[str, str]] = {"user": _HARMLESS}
    REFUSED: ClassVar[dict[str, str]] = {
        "best_of": "this server returns all answers that it generates; use n",
        "suffix": "the model continues a text; it does not fill gaps",
    }


class TokenizeRequest(Strict):
    """The body of POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Items[ChatMessage], Field(min_length=1)] | None = None
    tools: Items[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Items[TokenId]


class InputText(Part):
    """A part of a message of the Responses API."""

    type: Annotated[Literal["input_text", "output_text", "text"], BeforeValidator(_read_kind)]
    text: str
    # Answers are sent back with these.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """A turn of a conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[InputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Strict):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    # Answers are sent back with these.
    async_: Annotated[None, Field(alias="async")] = None
    caller: None = None
    namespace: None = None


class InputResult(Strict):
    """What a function has returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[InputText]
    id: str | None = None
    status: str | None = None


class InputReasoning(Strict):
    """Reasoning in an earlier answer, which models do not need again."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: str | None = None


_ITEMS = {
    "message": "InputMessage",
    "function_call": "InputCall",
    "function_call_output": "InputResult",
    "reasoning": "InputReasoning",
}


def _item(content: Any) -> str | None:
    # Errors are then about the kind that the client means. A message needs no type.
    kind = content.get("type") if isinstance(content, dict) else None
    return _ITEMS.get("message" if kind is None else kind) if isinstance(kind, str | None) else None


InputItem: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("InputMessage")]
    | Annotated[InputCall, Tag("InputCall")]
    | Annotated[InputResult, Tag("InputResult")]
    | Annotated[InputReasoning, Tag("InputReasoning")],
    Discriminator(
        _item,
        custom_error_type="unknown_item",
        custom_error_message=f"unknown type; this server knows {', '.join(_ITEMS)}",
    ),
]


def _check_callers(callers: list[str]) -> list[str]:
    if "direct" not in callers:
        raise PydanticCustomError("callers", 'this server has no programs that call functions; add "direct"')
    return callers


class FlatTool(Function):
    """A function, without the envelope of chat completions.

    All functions are described to the model, which calls them itself and waits for the results, so other
    ways to call one are refused.
    """

    type: Literal["function"]
    allowed_callers: (
        Annotated[Items[Literal["direct", "programmatic"]], AfterValidator(_check_callers)] | None
    ) = None
    async_: Annotated[Literal[False] | None, Field(alias="async")] = None
    defer_loading: Literal[False] | None = None
    # It is for such programs.
    output_schema: dict[str, Any] | None = None


class FlatNamedTool(Strict):
    """Demands a call of this function."""

    type: Literal["function"]
    name: str


class FlatAllowedTools(Strict):
    """Hides all functions but these."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[FlatNamedTool]


FlatToolChoice: TypeAlias = Annotated[
    Annotated[FlatNamedTool, Tag("Named")] | Annotated[FlatAllowedTools, Tag("Allowed")],
    Discriminator(_choice),
]


class TextFormat(Strict):
    """The form of the answer, without the envelope of chat completions."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    """How to write; `verbosity` has no effect."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Strict):
    """The body of POST /v1/responses; the fields from `seed` on are extensions."""

    model: str | None = None
    input: str | Annotated[Items[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    metadata: Table[str] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    temperature: float | None = None
    text: TextOptions | None = None
    tool_choice: ToolMode | FlatToolChoice | None = None
    tools: Items[FlatTool] | None = None
    top_p: float | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    IGNORED: ClassVar[dict[str, str]] = {
        "include": "there is nothing more to include",
        "prompt_cache_key": "equal beginnings of prompts are found by their tokens; see cache_salt",
        "prompt_cache_options": "as prompt_cache_key",
        "prompt_cache_retention": "as prompt_cache_key",
        "reasoning": "Llama models have no such setting; see chat_template_kwargs",
        "safety_identifier": _HARMLESS,
        "service_tier": _HARMLESS,
        "store": "nothing is stored",
        "stream_options": "streams are not padded, and always have usage",
        "user": _HARMLESS,
    }
    REFUSED: ClassVar[dict[str, str]] = {
        "access_programs": "this server has none",
        "background": "this server stores nothing: read the answer, or stream it",
        "background_options": "as background",
        "context_management": "a prompt is never changed",
        "conversation": "this server stores nothing: send the whole conversation as input",
        "image": "this server reads text only",
        "max_tool_calls": _NO_TOOLS_OF_ITS_OWN,
        "moderation": "this server does not moderate",
        "previous_response_id": "this server stores nothing: send the whole conversation as input",
        "prompt": "this server has no stored prompts",
        "top_logprobs": "use /v1/chat/completions for log-probabilities",
        "truncation": "a prompt is never truncated",
    }
