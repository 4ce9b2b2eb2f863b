"""What the caller passes to a chat template: copied as plain data, and bounded."""

import enum
import itertools
import json
import shutil
import signal
import threading
import time
from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import candle_llama
from jinja_reference import MESSAGES, rendered


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another"


class Number(enum.IntEnum):
    ONE = 1


class EndlessSequence(Sequence[int]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        return index


class EndlessMapping(Mapping[str, int]):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[str]:
        return map(str, itertools.count())

    def __getitem__(self, key: str) -> int:
        return 1


def doubled() -> list[Any]:
    value: list[Any] = [1]
    for _ in range(40):
        value = [value, value]
    return value


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def cyclic_dict() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["a"] = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [range(10**12), doubled(), EndlessSequence(), EndlessMapping(), cyclic(), cyclic_dict(), [1] * 10**6],
    ids=lambda value: type(value).__name__,
)
def test_what_is_too_large(tokenizer: candle_llama.Tokenizer, value: Any) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"values|nested"):
        tokenizer.apply_chat_template(MESSAGES, chat_template="a", value=value)
    with pytest.raises(ValueError, match=r"values|nested"):
        tokenizer.apply_chat_template([{**MESSAGES[0], "extra": value}], chat_template="a")
    with pytest.raises(ValueError, match=r"values|nested"):
        tokenizer.apply_chat_template(MESSAGES, tools=[{"a": value}], chat_template="a")
    assert time.process_time() - started < 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**5000], ids=["nan", "inf", "large"])
def test_numbers_that_are_refused(tokenizer: candle_llama.Tokenizer, value: float) -> None:
    with pytest.raises(ValueError, match=r"not finite|too large"):
        tokenizer.apply_chat_template(MESSAGES, chat_template="a", value=[value])


@pytest.mark.parametrize("value", [object(), {1}, iter([]), print, {1: 2}, {"a": b"".join}, 1j])
def test_what_is_no_data(tokenizer: candle_llama.Tokenizer, value: Any) -> None:
    with pytest.raises(TypeError, match=r"can be passed|keys are strings"):
        tokenizer.apply_chat_template(MESSAGES, chat_template="a", value=[value])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Text("a"), "a"),
        (Number.ONE, "1"),
        (True, "True"),
        (None, "None"),
        (1.0, "1.0"),
        (2**70, str(2**70)),
        ([Text("a"), Number.ONE], "['a', 1]"),
        ((1, [2]), "(1, [2])"),
        (range(3), "[0, 1, 2]"),
        (OrderedDict(b=1, a=2), "{'b': 1, 'a': 2}"),
        (UserDict({"a": UserDict({"b": ()})}), "{'a': {'b': ()}}"),
        ({Text("a"): 1}, "{'a': 1}"),
    ],
    ids=repr,
)
def test_what_arrives(tokenizer: candle_llama.Tokenizer, value: Any, text: str) -> None:
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="{{ value }}", value=value) == text


def test_the_caller_may_name_the_special_tokens(tokenizer: candle_llama.Tokenizer) -> None:
    template = "{{ bos_token }}{{ documents }}{{ range }}"
    given = {"bos_token": "<b>", "documents": ["d"], "range": 5}
    assert tokenizer.apply_chat_template(MESSAGES, chat_template=template, **given) == "<b>['d']5"


def test_a_lone_surrogate_is_no_prompt(tokenizer: candle_llama.Tokenizer) -> None:
    with pytest.raises(ValueError, match="unpaired surrogate"):
        rendered(tokenizer, "{{ messages[0].content }}", [{"role": "user", "content": "\ud800"}])


def test_ctrl_c_is_heard(tokenizer: candle_llama.Tokenizer) -> None:
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        rendered(tokenizer, loops)
    assert time.monotonic() - started < 1
    assert rendered(tokenizer, "{{ 1 }}") == "1"


def test_threads_have_budgets_of_their_own(tokenizer: candle_llama.Tokenizer) -> None:
    # Each makes 300 MiB, of the 512 that one rendering may make.
    template = "{% for i in range(30) %}{% set x = messages[0].content * 1000000 %}{% endfor %}{{ i }}ok"
    messages = [{"role": "user", "content": "0123456789"}]
    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(lambda _: rendered(tokenizer, template, messages), range(8)))
    assert texts == ["ok"] * 8


def test_a_template_is_compiled_once(tokenizer: candle_llama.Tokenizer) -> None:
    # A comment that no other test has.
    template = "{# " + "x" * 100_000 + " #}" + "{{ 1 }}" * 2000
    started = time.process_time()
    rendered(tokenizer, template)
    once = time.process_time() - started
    started = time.process_time()
    for _ in range(5):
        rendered(tokenizer, template)
    assert time.process_time() - started < once


def test_an_error_names_the_template_and_the_line(tiny_with_templates: candle_llama.Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^chat template 'tool_use', line 2: no tools$"):
        tiny_with_templates.apply_chat_template(MESSAGES, tools=[])
    with pytest.raises(ValueError, match=r"^chat template 'rag', line 1: 'x' is undefined$"):
        tiny_with_templates.apply_chat_template(MESSAGES, chat_template="rag")
    with pytest.raises(ValueError, match=r"^chat template, line 1: "):
        tiny_with_templates.apply_chat_template(MESSAGES, chat_template="{{ 1 + }}")
    assert tiny_with_templates.apply_chat_template(MESSAGES) == "default"


@pytest.fixture
def tiny_with_templates(tiny: Path, tmp_path: Path) -> candle_llama.Tokenizer:
    folder = shutil.copytree(tiny, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = [
        {"name": "default", "template": "default"},
        {"name": "tool_use", "template": "\n{{ raise_exception('no tools') }}"},
        {"name": "rag", "template": "{{ x.y }}"},
    ]
    path.write_text(json.dumps(config))
    return candle_llama.load_tokenizer(folder)
