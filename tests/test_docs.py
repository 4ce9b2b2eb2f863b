"""Checks docs/ against the code: runs every call that it shows, and finds every message that it quotes."""

import argparse
import asyncio
import builtins
import inspect
import io
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import candle_llama
import tiny as checkpoints
from candle_llama import cli, hub
from candle_llama.cli import serve
from candle_llama.sampling import FIELDS
from candle_llama.server.schema import ChatRequest, CompletionRequest, ResponsesRequest

ROOT = Path(__file__).parent.parent
MIGRATING = ROOT / "docs" / "migrating.md"
SERVER = ROOT / "docs" / "server.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


def tables(path: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yields the section and the rows of each table in a Markdown file; a row is a dict by column names."""
    section, table = "", []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if table:
            names, _, *rows = table
            yield section, [dict(zip(names, row, strict=True)) for row in rows]
            table = []
        if line.startswith("#"):
            section = line.strip("# ")


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def column(name: str, but_for: str = "") -> list[str]:
    """All code in the columns of this name, except in the section `but_for`; each piece once."""
    cells = (row.get(name, "") for section, rows in tables(MIGRATING) if section != but_for for row in rows)
    return list(dict.fromkeys(code for cell in cells for code in codes(cell)))


CALLS = column("candle-llama", but_for="Sampling parameters")
COMMANDS = [code for code in CALLS if code.startswith("candle-llama ")]
WORKAROUNDS = [code for code in column("what to do") if "llm." in code]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models that the page names."""
    folder = tmp_path_factory.mktemp("docs")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = checkpoints.gguf_config(max_position_embeddings=8192, **heads)
    quantised = checkpoints.write_gguf(folder / "model.gguf", config, matrix_type="Q4_0")
    return {
        "org/name": checkpoints.write_checkpoint(folder / "name", config),
        "org/name:*Q4_0.gguf": quantised,
        "model.gguf": quantised,
        "f16.gguf": checkpoints.write_gguf(folder / "f16.gguf", config, matrix_type="F16"),
    }


@pytest.fixture
def at_home(sources, tmp_path, monkeypatch):
    """Finds the page's models without a hub; files that its calls write go to a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "resolve", lambda source, **_: sources[source])


# The template of the tests' model has no place for tools.
@pytest.mark.filterwarnings("ignore:the chat template never reads 'tools'")
@pytest.mark.parametrize("code", [code for code in CALLS + WORKAROUNDS if code not in COMMANDS])
def test_calls_of_the_migration_page_work(code, at_home):
    with candle_llama.load("org/name") as llm:
        *_, last = llm.stream("hello", max_new_tokens=3)
        names = {
            "asyncio": asyncio,
            "candle_llama": candle_llama,
            "math": math,
            "llm": llm,
            "prompt": "hello",
            "prompts": ["hello", "the world"],
            "messages": [{"role": "user", "content": "hello"}],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
            "template": checkpoints.CHAT_TEMPLATE,
            "text": "hello",
            "ids": llm.tokenizer.encode("hello world"),
            "params": candle_llama.SamplingParams(max_new_tokens=3),
            "context": "hello",
            "continuation": " world",
            "chunk": last,
        }
        if re.match(r"for |\w+ = ", code):
            exec(code, names)
            return
        result = eval(code, names)
        if inspect.isawaitable(result):
            result = asyncio.run(result)
        assert (result is None) == (code == "llm.close()")


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_migration_page_work(line, at_home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert cli.main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_the_migration_page_names_every_command_and_every_sampling_parameter():
    commands = {code.split()[1] for code in codes(MIGRATING.read_text(encoding="utf-8")) if code in COMMANDS}
    assert commands | {"doctor", "serve"} == set(cli.COMMANDS)
    (parameters,) = (rows for section, rows in tables(MIGRATING) if section == "Sampling parameters")
    named = [name for row in parameters for name in codes(row["candle-llama"])]
    assert sorted(named) == sorted([*FIELDS, "max_tokens"])


# Features that do not exist, and the names they would get. If one of them is added, the page must change.
ABSENT = {
    "embeddings": {"embed", "embeddings"},
    "LoRA adapters": {"lora", "adapter"},
    "beam search": {"num_beams"},
    "several answers to a prompt": {"n", "num_return_sequences"},
    "speculative decoding with a draft model": {"draft_model"},
    "saved prompts, `save_state`, prompt caches in files": {"save_state", "load_state"},
    "a KV cache of less than 8 bits, or one that rotates": {"max_kv_size", "kv_bits"},
    "`mirostat`, `typical_p`, `xtc`, `no_repeat_ngram_size`": {"mirostat", "typical_p", "xtc_probability"},
    "layers split between GPU and CPU": {"device_map", "n_gpu_layers"},
    "images, audio": {"images", "audio"},
    "training": {"train", "fit"},
    "architectures other than Llama": {"AutoModel"},
}


def test_features_that_the_migration_page_calls_absent_do_not_exist():
    (rows,) = (rows for section, rows in tables(MIGRATING) if section == "What candle-llama does not have")
    assert [row[""] for row in rows] == list(ABSENT)
    here = {
        *candle_llama.__all__,
        *dir(candle_llama.Llama),
        *inspect.signature(candle_llama.load).parameters,
        *FIELDS,
        *cli.COMMANDS,
    }
    assert not here & set().union(*ABSENT.values())


def test_the_server_page_names_every_field_and_every_flag():
    both, chats, completions, responses = (rows for section, rows in tables(SERVER) if section == "Fields")
    for kind, rows in (
        (ChatRequest, both + chats),
        (CompletionRequest, both + completions),
        (ResponsesRequest, responses),
    ):
        words = {name: re.split("[,:;]", row[""])[0] for row in rows for name in codes(row["field"])}
        assert {name for name, word in words.items() if "ignored" in word} == {*kind.IGNORED}
        assert {name for name, word in words.items() if "refused" in word} >= {*kind.REFUSED}
        assert set(words) == {*kind.model_fields, *kind.IGNORED, *kind.REFUSED}
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    (group,) = (group for group in parser._action_groups if group.title == "serving")
    flags = [action.option_strings[0] for action in group._group_actions]
    (rows,) = (rows for section, rows in tables(SERVER) if section == "Start it")
    assert [row["flag"] for row in rows] == [f"`{flag}`" for flag in flags]


def messages() -> list[str]:
    """The messages with which the bullets of the troubleshooting page begin."""
    _, *sections = TROUBLESHOOTING.read_text(encoding="utf-8").split("\n## ")
    bullets = [bullet for section in sections for bullet in re.findall(r"^- .*(?:\n  .*)*", section, re.M)]
    quoted = [re.match(r"- (?:`[^`]+`,?\s+)*`[^`]+`(?=:\s)", bullet) for bullet in bullets]
    assert [bullet for bullet, match in zip(bullets, quoted, strict=True) if match is None] == [
        bullet for bullet in bullets if bullet.startswith("- Any other text: ")
    ]
    return [message for match in quoted if match for message in codes(match[0])]


@pytest.fixture(scope="module")
def source_texts() -> str:
    """The sources, with the parts of multi-line strings joined."""
    folders = [("src", "*.rs"), ("crates", "*.rs"), ("python", "*.py")]
    files = [file for folder, kind in folders for file in (ROOT / folder).rglob(kind)]
    files.append(ROOT / ".ci" / "tools")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    text = re.sub(r"\\\n\s*", "", text)
    text = re.sub(r"\"\n\s*f?\"", "", text)
    return text.replace('\\"', '"')


def is_given(message: str, source_texts: str) -> bool:
    """Whether a message is in the sources; "..." stands for values that are filled in."""
    pieces = [re.escape(piece.strip()) for piece in message.split("...") if piece.strip()]
    return re.search(r"[^\n]{1,60}?".join(pieces), source_texts) is not None


@pytest.mark.parametrize("message", messages())
def test_messages_of_the_troubleshooting_page_are_in_the_sources(message, source_texts):
    assert is_given(message, source_texts)


@pytest.mark.parametrize("message", ["the model is in a bad mood", "is gated ... the context holds"])
def test_a_message_that_does_not_exist_is_noticed(message, source_texts):
    assert not is_given(message, source_texts)


def test_classes_of_the_troubleshooting_page_have_the_attributes():
    rows = next(rows for section, rows in tables(TROUBLESHOOTING))
    for row in rows:
        for name in codes(row["class"]):
            cls = getattr(candle_llama, name, None) or getattr(builtins, name)
            assert all(hasattr(cls, attribute) for attribute in codes(row["attributes"])), name
    ours = {name for name in candle_llama.__all__ if name.endswith("Error")}
    assert {name for row in rows for name in codes(row["class"])} >= ours - {"CandleLlamaError"}


def tracked_text() -> dict[str, str]:
    """The project's own text files by path, in a checkout or in an unpacked archive of one."""
    folders = [".ci", ".github", "crates", "docs", "examples", "fuzz", "python", "src", "tests"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    files += [*ROOT.glob("*.md"), *(ROOT / name for name in ("Cargo.toml", "Makefile", "pyproject.toml"))]
    suffixes = {".rs", ".py", ".pyi", ".md", ".toml", ".yml", ".sh", ""}
    skipped = {"__pycache__", "target", "corpus", "found", "artifacts"}
    return {
        file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
        for file in files
        if file.suffix in suffixes and not skipped & set(file.parts)
    }


def test_lines_have_at_most_110_columns() -> None:
    # The tests' chat templates are one line each, and ruff looks at the rest of these files.
    long = [
        f"{name}:{number}: {len(line)} columns"
        for name, text in tracked_text().items()
        if not name.startswith("tests/")
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 110 and "http" not in line
    ]
    assert not long, "\n".join(long)


FOREIGN = {"settrace"}  # Python's own; we do not call it, and architecture.md says why


def last_name(code: str) -> str | None:
    """The name that a piece of code in a page stands for: `scale` of `Rope::scale(...)`."""
    names = re.findall(r"[A-Za-z_]\w{2,}", re.split(r"[(=!<]", code)[0])
    return names[-1] if names else None


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md", "docs/kernels.md"])
def test_files_and_names_in_a_page_exist(page: str) -> None:
    texts = tracked_text()
    prose = re.sub(r"```.*?```", "", texts.pop(page), flags=re.S)
    paths = [*texts, "docs/architecture.md", "docs/kernels.md", "CONTRIBUTING.md", "Cargo.lock", ".gitignore"]
    sources = "\n".join(text for name, text in texts.items() if not name.endswith(".md"))
    missing = []
    for code in dict.fromkeys(codes(prose)):
        if re.search(r"[ {*]", code):
            continue
        if re.search(r"\.(rs|py|pyi|md|toml|yml|txt)$", code):
            known = any(f"/{path}".endswith(f"/{code}") for path in paths) or (ROOT / code).exists()
            known = known or any((ROOT / "crates/kernels/tests/golden").glob(code.rsplit("/", 1)[-1]))
        elif code.endswith("/"):
            known = any(f"/{code}" in f"/{path}" for path in paths)
        else:
            name = last_name(code)
            known = name is None or name in sources or name in FOREIGN
        if not known:
            missing.append(code)
    assert not missing
