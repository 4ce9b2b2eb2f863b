"""Clients that people use with OpenAI's interface, unmodified, against the running server.

Each is skipped where it is not installed; `.ci/run` installs them.
"""

import asyncio
import functools
import importlib
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from serving import running

MODEL = "demo"
QUESTION = "What is the capital of France?"
# The clients' own deprecations are not ours.
pytestmark = pytest.mark.filterwarnings("default")


class City(BaseModel):
    """A city and its country."""

    city: str
    country: str


def need(*names: str) -> Any:
    """Imports modules and returns the last one; skips the test if one is missing."""
    for name in names:
        pytest.importorskip(name)
    return importlib.import_module(names[-1])


@pytest.fixture(scope="module")
def url(demo_llm):
    with running(demo_llm, served_model_name=MODEL) as server:
        yield server.url + "/v1"


@pytest.fixture(scope="module")
def expected(demo_llm):
    """What the model itself answers."""
    return demo_llm.chat([{"role": "user", "content": QUESTION}], temperature=0, max_new_tokens=64).text


# LangChain


@pytest.fixture
def langchain(url):
    module = need("langchain_openai")
    return module.ChatOpenAI(base_url=url, api_key="none", model=MODEL, temperature=0, max_tokens=64)


def test_langchain_invokes_and_streams(langchain, expected):
    answer = langchain.invoke(QUESTION)
    assert answer.content == expected
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = list(langchain.stream(QUESTION))
    assert len(pieces) > 3
    assert "".join(piece.content for piece in pieces) == expected


def weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"It is raining in {city}."


def test_langchain_calls_a_tool_and_sends_its_result_back(langchain):
    messages = need("langchain_openai", "langchain_core.messages")
    tools = importlib.import_module("langchain_core.tools")
    tool = tools.tool(weather)
    # Without `strict` the schema allows arguments that the function does not have.
    bind = functools.partial(langchain.bind_tools, [tool], strict=True)
    talk = [messages.HumanMessage("How is the weather in Paris?")]
    answer = bind(tool_choice="weather").invoke(talk)
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    result = tool.invoke(call)
    assert result.tool_call_id == call["id"]
    assert result.content.startswith("It is raining in ")
    final = bind().invoke([*talk, answer, result])
    assert final.content
    streamed = None
    for piece in bind(tool_choice="any").stream(talk):
        streamed = piece if streamed is None else streamed + piece
    assert [(one["name"], one["args"]) for one in streamed.tool_calls] == [(call["name"], call["args"])]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gives_structured_output(langchain, method):
    found = langchain.with_structured_output(City, method=method, strict=True).invoke(QUESTION)
    assert isinstance(found, City)


# openai-agents


def test_an_agent_uses_a_tool(url):
    agents = need("agents")
    agents.set_tracing_disabled(True)
    called = []

    @agents.function_tool
    def weather(city: str) -> str:
        """Tells the weather of a city."""
        called.append(city)
        return f"It is raining in {city}."

    async def main() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            agent = agents.Agent(
                name="helper",
                instructions="Answer with the help of your tools.",
                model=agents.OpenAIResponsesModel(model=MODEL, openai_client=client),
                model_settings=agents.ModelSettings(temperature=0, max_tokens=48, tool_choice="required"),
                tools=[weather],
            )
            return await agents.Runner.run(agent, "How is the weather in Paris?", max_turns=3)

    result = asyncio.run(main())
    assert len(called) == 1
    assert result.final_output
    assert {item.type for item in result.new_items} >= {"tool_call_item", "tool_call_output_item"}


# LlamaIndex


@pytest.fixture
def llama_index(url):
    module = need("llama_index.llms.openai_like")
    return module.OpenAILike(
        model=MODEL, api_base=url, api_key="none", is_chat_model=True, temperature=0, max_tokens=64
    )


def test_llama_index_completes_chats_and_streams(llama_index, expected, demo_llm):
    types = importlib.import_module("llama_index.core.llms")
    message = types.ChatMessage(role="user", content=QUESTION)
    assert llama_index.chat([message]).message.content == expected
    assert list(llama_index.stream_chat([message]))[-1].message.content == expected
    assert llama_index.complete(QUESTION).text == expected
    plain = llama_index.model_copy(update={"is_chat_model": False})
    text = demo_llm.generate(QUESTION, temperature=0, max_new_tokens=64).text
    assert plain.complete(QUESTION).text == text
    assert list(plain.stream_complete(QUESTION))[-1].text == text
