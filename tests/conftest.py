"""Shared fixtures: the demo model, tiny checkpoints, and a way to run the command."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama import hub

# Examples are random, except in CI: its verdict on a change must not depend on chance.
hypothesis.settings.register_profile("default", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)

# A shell without job control starts background processes with SIGINT ignored. The processes that tests start
# and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

RunCommand = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo model's file, SmolLM2-135M-Instruct."""
    return hub.resolve("demo")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded random checkpoint folder; tests that change one copy it."""
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> candle_llama.Tokenizer:
    return candle_llama.load_tokenizer(tiny)


@pytest.fixture(scope="session")
def special_tokens(tokenizer: candle_llama.Tokenizer) -> dict[str, str]:
    names = ["bos_token", "eos_token"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}],
        chat_template="{{ [bos_token, eos_token] | tojson }}",
        add_generation_prompt=False,
    )
    return dict(zip(names, json.loads(text), strict=True))


@pytest.fixture(scope="session")
def llm(tiny: Path) -> Iterator[candle_llama.Llama]:
    """The tiny checkpoint, loaded."""
    with candle_llama.load(tiny) as model:
        yield model


@pytest.fixture(scope="session")
def demo_llm(demo: Path) -> Iterator[candle_llama.Llama]:
    """The demo model, loaded."""
    with candle_llama.load(demo) as model:
        yield model


@pytest.fixture(scope="session")
def command() -> RunCommand:
    """Runs `candle-llama` with arguments in a process of its own."""

    def run(
        *arguments: object, env: dict[str, str] | None = None, input: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "candle_llama", *map(str, arguments)],
            input=input,
            capture_output=True,
            encoding="utf-8",
            timeout=100,
            env=os.environ | (env or {}),
            check=False,
        )

    return run
