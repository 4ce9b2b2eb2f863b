"""Rules that are checked by reading the sources: which module may use which, and where `unsafe` is allowed.

Every rule is a function from a source to complaints. It is applied to the repository, and to snippets that
must, or must not, cause complaints.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rust_source import RustSource

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
KERNELS = ROOT / "crates" / "kernels"
PACKAGE = ROOT / "python" / "candle_llama"

LADDER = (
    "error",
    "sys",
    "device",
    "kernels",
    "checkpoint",
    "config",
    "tokenizer",
    "kv_cache",
    "model",
    "sampling",
    "engine",
    "llama",
    "bindings",
)
# In addition to the ladder: the engine works on token ids and knows nothing of text.
NEVER = {("engine", "tokenizer")}
PYTHON_CRATES = {"pyo3", "numpy"}
GPU_FEATURES = {"cuda", "cudnn", "flash-attn", "metal", "accelerate", "nccl", "mkl"}
UNSAFE_FILES = re.compile(r"checkpoint/mmap\.rs$|sys/(platform|reserve)\.rs$")
NETWORK_CRATES = {
    *("attohttpc", "curl", "hf_hub", "hyper", "isahc", "minreq", "native_tls", "openssl", "quinn", "reqwest"),
    *("rustls", "socket2", "surf", "tungstenite", "ureq"),
}
NETWORK_PATHS = {
    *(("std", "net"), ("core", "net"), ("std", "os", "unix", "net"), ("tokio", "net"), ("mio", "net")),
    *(("libc", name) for name in ("socket", "connect", "bind", "getaddrinfo", "sendto", "recvfrom")),
}

Complaints = Iterator[str]


def top_module(source: RustSource) -> str | None:
    """The rung of the ladder that a file belongs to; None for lib.rs, which only lists them."""
    return source.module[0] if source.module else None


def root_names() -> dict[str, str]:
    """The names that lib.rs re-exports at the crate's root, and the module each name comes from."""
    library = RustSource("lib.rs", (SRC / "lib.rs").read_text())
    names = {}
    for path in library.paths:
        segments = [s for s in path.segments if s != "crate"]
        if path.public and segments[0] in LADDER:
            names[path.alias or segments[-1]] = segments[0]
    return names


def ladder(source: RustSource) -> Complaints:
    """A module uses only modules to its left on the ladder."""
    home = top_module(source)
    if home is None:
        return
    if home not in LADDER:
        yield f"`{home}` is not on the ladder"
        return
    exports = root_names()
    for path in source.paths:
        if path.segments[0] != "crate":
            continue
        name = path.segments[1] if len(path.segments) > 1 else "*"
        name = exports.get(name, name)
        if name not in LADDER:
            yield f"line {path.line}: `{path}` names no module of the ladder"
        elif LADDER.index(name) > LADDER.index(home):
            yield f"line {path.line}: `{home}` uses `{name}`, which is to its right (`{path}`)"
        elif (home, name) in NEVER:
            yield f"line {path.line}: `{home}` must not use `{name}` (`{path}`)"


def python_stays_in_bindings(source: RustSource) -> Complaints:
    """Only bindings use pyo3 and numpy."""
    if top_module(source) == "bindings":
        return
    for path in source.paths:
        if path.segments[0] in PYTHON_CRATES:
            yield f"line {path.line}: `{path}` outside bindings"


def no_network(source: RustSource) -> Complaints:
    """Rust never uses the network: Python does the downloads."""
    for path in source.paths:
        network = any(path.segments[: len(taboo)] == taboo for taboo in NETWORK_PATHS)
        if network or path.segments[0] in NETWORK_CRATES:
            yield f"line {path.line}: `{path}` reaches the network"


def gpu_features_in_device(source: RustSource) -> Complaints:
    """Only device.rs has cfgs of the GPU features."""
    if source.name == "device.rs":
        return
    for first, second, third in zip(source.tokens, source.tokens[1:], source.tokens[2:], strict=False):
        if first.text == "feature" and second.text == "=" and third.text.strip('"') in GPU_FEATURES:
            yield f"line {first.line}: cfg of feature {third.text} outside device.rs"


def unsafe_only_where_allowed(source: RustSource) -> Complaints:
    """`unsafe` is allowed only in the kernels crate, checkpoint/mmap.rs and sys/{platform,reserve}.rs."""
    if UNSAFE_FILES.match(source.name):
        return
    for token in source.tokens:
        if token.text in ("unsafe", "unsafe_code"):
            yield f"line {token.line}: `{token.text}` is not allowed in this file"


def unsafe_is_explained(source: RustSource) -> Complaints:
    """Every unsafe block and impl has its SAFETY note, above its statement or inside it."""
    for index, token in enumerate(source.tokens[:-1]):
        if token.text != "unsafe" or source.tokens[index + 1].text not in ("{", "impl"):
            continue
        start = index
        while start > 0 and source.tokens[start - 1].text not in (";", "{", "}"):
            start -= 1
        first = line = source.tokens[start].line
        while line - 1 in source.comments:
            line -= 1
        notes = " ".join(source.comments.get(n, "") for n in range(line, token.line + 1))
        if "SAFETY:" not in notes:
            yield f"line {token.line}: no SAFETY note above (statement begins at line {first})"


RUST_RULES = (
    ladder,
    python_stays_in_bindings,
    no_network,
    gpu_features_in_device,
    unsafe_only_where_allowed,
    unsafe_is_explained,
)


# `unsafe` is allowed in the kernels crate. Its manifest says what it may import: see below.
KERNEL_RULES = (no_network, unsafe_is_explained)


def rust_sources(folder: Path) -> list[RustSource]:
    files = sorted(folder.rglob("*.rs"))
    return [RustSource(file.relative_to(folder).as_posix(), file.read_text()) for file in files]


@pytest.mark.parametrize(
    ("folder", "rule"),
    [(SRC, rule) for rule in RUST_RULES] + [(KERNELS / "src", rule) for rule in KERNEL_RULES],
    ids=lambda value: value.parent.name if isinstance(value, Path) else value.__name__,
)
def test_rust_sources_keep_the_rule(folder: Path, rule: Callable[[RustSource], Complaints]) -> None:
    complaints = []
    for source in rust_sources(folder):
        complaints += [f"{folder / source.name}: {complaint}" for complaint in rule(source)]
    assert not complaints, "\n".join(complaints)


def test_the_sources_are_read() -> None:
    """Checks that the rules do read sources: there are modules, and they use modules below them."""
    sources = rust_sources(SRC)
    assert {top_module(source) for source in sources} >= {"error", "sys", "checkpoint", "config"}
    named = {path.segments[1] for source in sources for path in source.paths if path.segments[0] == "crate"}
    assert named & {"error", "Error", "Result"}
    assert {source.name for source in rust_sources(KERNELS / "src")} >= {"lib.rs", "dispatch.rs"}


BROKEN = [
    (ladder, "checkpoint/mod.rs", "use crate::model::Model;"),
    (ladder, "config/hf.rs", "use crate::{error::Result, tokenizer::{self, Tokenizer}};"),
    (ladder, "config/hf.rs", "fn f() { let _ = crate::llama::load(); }"),
    (ladder, "sys.rs", "use super::engine::Sequence;"),
    (ladder, "sys.rs", "use super::*;"),
    (ladder, "config/hf.rs", "use super::super::sampling;"),
    (ladder, "config/hf.rs", "mod tests { use super::super::super::llama::Llama; }"),
    (ladder, "config/hf.rs", "use crate as everything;"),
    (ladder, "config/hf.rs", "use candle_llama::engine::Engine;"),
    (ladder, "config/hf.rs", "fn f<T>() -> <u8 as crate::engine::Step>::Out { todo!() }"),
    (ladder, "config/hf.rs", "macro_rules! m { () => { $crate::engine::step() } }"),
    (ladder, "config/hf.rs", 'const A: &str = "\\"; // "; use crate::engine::E;\n use crate::llama::L;'),
    (ladder, "engine/batch.rs", "use crate::tokenizer::Tokenizer;"),
    (ladder, "engine/batch.rs", "use crate::{error, sampling::{Sampler}, tokenizer};"),
    (ladder, "extras/mod.rs", ""),
    (python_stays_in_bindings, "llama.rs", "use pyo3::prelude::*;"),
    (python_stays_in_bindings, "llama.rs", "fn f(a: numpy::PyArray1<f32>) {}"),
    (python_stays_in_bindings, "llama.rs", "#[pyo3::pyclass] struct A;"),
    (no_network, "checkpoint/mod.rs", "use std::{fs, net::TcpStream};"),
    (no_network, "checkpoint/mod.rs", "fn f() { let _ = ::std::net::TcpStream::connect(a); }"),
    (no_network, "checkpoint/mod.rs", "fn f() { ureq::get(url); }"),
    (no_network, "sys.rs", "fn f() { libc::socket(0, 0, 0); }"),
    (no_network, "bindings/mod.rs", "extern crate reqwest;"),
    (gpu_features_in_device, "model/candle.rs", '#[cfg(feature = "cuda")] mod gpu {}'),
    (gpu_features_in_device, "lib.rs", '#[cfg(not(any(feature="flash-attn", test)))] mod gpu {}'),
    (gpu_features_in_device, "llama.rs", 'const METAL: bool = cfg!(feature = "metal");'),
    (unsafe_only_where_allowed, "checkpoint/gguf.rs", "fn f(p: *const u8) -> u8 { unsafe { *p } }"),
    (unsafe_only_where_allowed, "checkpoint/tied.rs", "unsafe impl Send for A {}"),
    (unsafe_only_where_allowed, "model/cpu/mod.rs", "#![allow(unsafe_code)]"),
    (unsafe_is_explained, "pool.rs", "fn f(p: *const u8) -> u8 {\n    unsafe { *p }\n}"),
    (unsafe_is_explained, "pool.rs", "// SAFETY: f's.\nfn f() {}\nunsafe impl Send for A {}"),
    (
        unsafe_is_explained,
        "sys.rs",
        "fn f() {\n    // SAFETY: g's.\n    g();\n    let x =\n        unsafe { h() };\n}",
    ),
]

SOUND = [
    (ladder, "lib.rs", "pub mod engine; pub use engine::Engine;"),
    (ladder, "engine/batch.rs", "use crate::{error::Result, model::{Model, Span}, sampling};"),
    (ladder, "config/hf.rs", "mod tests { use super::*; use super::super::gguf; use self::inner::A; }"),
    (
        ladder,
        "config/hf.rs",
        "/// See [`crate::engine`]. /* crate::llama */\nuse crate::checkpoint::gguf as g;",
    ),
    (
        ladder,
        "config/hf.rs",
        "/* outer /* use crate::llama; */ use crate::llama; */ use crate::config::rope;",
    ),
    (ladder, "config/hf.rs", 'const A: &str = "use crate::llama;"; const B: &str = r#"" crate::llama::x"#;'),
    (ladder, "config/hf.rs", "fn f<'a>(x: &'a str) -> char { let q = '\"'; crate::error::g(q, x) } // \""),
    (ladder, "llama.rs", "pub(crate) fn f(a: Vec<u8>) { Vec::<u8>::with_capacity(a.len() as usize); }"),
    (python_stays_in_bindings, "bindings/mod.rs", "use pyo3::prelude::*;"),
    (python_stays_in_bindings, "model/mod.rs", "/// As numpy::dot.\nfn f(numpy: u8) {}"),
    (no_network, "checkpoint/mod.rs", "use std::{fs, io}; // not std::net::TcpStream"),
    (gpu_features_in_device, "device.rs", 'const CUDA: bool = cfg!(feature = "cuda");'),
    (gpu_features_in_device, "lib.rs", '#[cfg(feature = "python")] mod bindings; const A: &str = "cuda";'),
    (unsafe_only_where_allowed, "checkpoint/mmap.rs", "unsafe impl Send for A {}"),
    (unsafe_only_where_allowed, "checkpoint/gguf.rs", 'const A: &str = "unsafe"; // unsafe'),
    (
        unsafe_is_explained,
        "sys.rs",
        "fn f() {\n    // SAFETY: checked\n    // above.\n    let x = unsafe { h() };\n}",
    ),
    (
        unsafe_is_explained,
        "sys.rs",
        "fn f() {\n    // SAFETY: checked.\n    let x =\n        unsafe { h() };\n}",
    ),
    (
        unsafe_is_explained,
        "sys.rs",
        "// SAFETY: A owns its pages.\nunsafe impl Send for A {}\nunsafe fn f() {}",
    ),
]


@pytest.mark.parametrize(("rule", "name", "text"), BROKEN)
def test_a_broken_rust_rule_is_seen(rule: Callable[[RustSource], Complaints], name: str, text: str) -> None:
    assert list(rule(RustSource(name, text)))


@pytest.mark.parametrize(("rule", "name", "text"), SOUND)
def test_sound_rust_causes_no_complaints(
    rule: Callable[[RustSource], Complaints], name: str, text: str
) -> None:
    assert not list(rule(RustSource(name, text)))


def dependencies(manifest: str) -> set[str]:
    """Direct dependencies of a Cargo.toml."""
    return set(tomllib.loads(manifest).get("dependencies", {}))


def network_dependencies(manifest: str) -> list[str]:
    """Direct dependencies of a Cargo.toml that reach the network."""
    taboo = NETWORK_CRATES | {"tokio"}
    return sorted(name for name in dependencies(manifest) if name.replace("-", "_") in taboo)


@pytest.mark.parametrize("folder", [ROOT, KERNELS], ids=["candle-llama", "kernels"])
def test_cargo_depends_on_no_network_crate(folder: Path) -> None:
    assert network_dependencies((folder / "Cargo.toml").read_text()) == []


def test_kernels_depend_on_nothing_of_ours_or_candles() -> None:
    assert dependencies((KERNELS / "Cargo.toml").read_text()) == {"bytemuck", "half", "libc", "libm"}


def test_a_network_dependency_is_seen() -> None:
    assert network_dependencies('[dependencies]\nhf-hub = "0.5"\nserde = "1"') == ["hf-hub"]


# --- Python ---

# `import candle_llama` does not load these: the server and the integrations.
OPTIONAL_PARTS = ("server/", "integrations/")
# Loaded when a chat template is first rendered; nothing else names Jinja.
JINJA_PART = "chat_template/jinja/"
JINJA = {"jinja2", "markupsafe"}
DOWNLOADERS = {"huggingface_hub", "requests", "httpx", "urllib3", "aiohttp"}


def imports(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yields line, module, and whether importing the file imports that module at once."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, at_once
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "candle_llama" if node.level else node.module or "", at_once
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from walk(child, at_once)
        else:
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_once and not later)

    yield from walk(ast.parse(text), True)


def light_import(name: str, text: str) -> Complaints:
    """`import candle_llama` imports only the standard library and numpy."""
    if name.startswith(OPTIONAL_PARTS):
        return
    is_jinja = name.startswith(JINJA_PART)
    light = sys.stdlib_module_names | {"numpy", "candle_llama"} | (JINJA if is_jinja else set())
    heavy = "candle_llama." + JINJA_PART.strip("/").replace("/", ".")
    for line, module, at_once in imports(text):
        if at_once and (module.partition(".")[0] not in light or (module.startswith(heavy) and not is_jinja)):
            yield f"line {line}: imports `{module}` at the top level"


def jinja_in_its_part(name: str, text: str) -> Complaints:
    """Only the part that runs chat templates names Jinja."""
    if name.startswith(JINJA_PART):
        return
    for line, module, _ in imports(text):
        if module.partition(".")[0] in JINJA:
            yield f"line {line}: imports `{module}` outside {JINJA_PART}"


def downloads_in_hub(name: str, text: str) -> Complaints:
    """Only hub.py downloads."""
    if name == "hub.py":
        return
    for line, module, _ in imports(text):
        if module.partition(".")[0] in DOWNLOADERS or module == "urllib.request":
            yield f"line {line}: imports `{module}` outside hub.py"


PYTHON_RULES = (light_import, jinja_in_its_part, downloads_in_hub)


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_python_sources_keep_the_rule(rule: Callable[[str, str], Complaints]) -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "__init__.py" in files
    complaints = []
    for file in files:
        name = file.relative_to(PACKAGE).as_posix()
        complaints += [f"{name}: {complaint}" for complaint in rule(name, file.read_text())]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (light_import, "llama.py", "import torch"),
        (light_import, "llama.py", "from transformers import AutoTokenizer"),
        (light_import, "cli/main.py", "try:\n    import jinja2.sandbox\nexcept ImportError:\n    pass"),
        (light_import, "hub.py", "if True:\n    from huggingface_hub import snapshot_download"),
        (light_import, "types.py", "class A:\n    import fastapi"),
        (light_import, "chat_template/plain.py", "import jinja2"),
        (light_import, "chat_template/jinja/filters.py", "import torch"),
        (light_import, "tokenizer.py", "from candle_llama.chat_template.jinja import compile_template"),
        (jinja_in_its_part, "tokenizer.py", "def f():\n    from jinja2 import Template"),
        (downloads_in_hub, "llama.py", "def f():\n    from huggingface_hub import snapshot_download"),
        (downloads_in_hub, "cli/main.py", "import urllib.request"),
    ],
)
def test_a_broken_python_rule_is_seen(rule: Callable[[str, str], Complaints], name: str, text: str) -> None:
    assert list(rule(name, text))


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (
            light_import,
            "llama.py",
            "import json\nimport numpy as np\nfrom . import types\nfrom ._core import Llama",
        ),
        (light_import, "hub.py", "def f():\n    import huggingface_hub"),
        (light_import, "types.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        (light_import, "server/app.py", "import fastapi"),
        (light_import, "chat_template/jinja/filters.py", "import jinja2\nfrom markupsafe import Markup"),
        (light_import, "a.py", "def f():\n    from candle_llama.chat_template.jinja import compile_template"),
        (jinja_in_its_part, "a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jinja2"),
        (downloads_in_hub, "hub.py", "def f():\n    import huggingface_hub"),
    ],
)
def test_sound_python_causes_no_complaints(
    rule: Callable[[str, str], Complaints], name: str, text: str
) -> None:
    assert not list(rule(name, text))
