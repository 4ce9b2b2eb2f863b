"""Runs the server for tests: in a thread, on a free port of the loopback interface."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import uvicorn

import candle_llama
from candle_llama.server import build_app
from candle_llama.server.run import listen, url
from candle_llama.server.state import State

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@dataclasses.dataclass
class Running:
    """A server that runs."""

    url: str
    state: State
    call: Callable[[Callable[[], Any]], None]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def openai_client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def running(llm: candle_llama.Llama, **options: Any) -> Iterator[Running]:
    """Serves a model while the block runs."""
    app = build_app(llm, **options)
    listener = listen("127.0.0.1", 0)
    # The HTTP library is that of the command `serve`.
    config = uvicorn.Config(app, log_level="critical", http="h11", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([listener])))
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(url(listener), app.state.server, lambda work: loop.call_soon_threadsafe(work) and None)
    finally:
        server.should_exit = True
        thread.join(20)
        loop.close()
        listener.close()
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def is_idle(llm: candle_llama.Llama) -> bool:
    now = llm.metrics()
    return now.running == now.waiting == now.blocks_used == 0
