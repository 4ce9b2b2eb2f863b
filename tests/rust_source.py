"""A reader of Rust sources, just good enough to check rules about them.

It separates comments and literals from code, so that a word in a doc comment cannot break a rule. It resolves
every path to the crate's root, through `use` groups, `self` and `super`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

TOKEN = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<comment>//[^\n]*)
    | (?P<block_comment>/\*)
    | (?P<raw_string>(?:b|c)?r(?P<hashes>\#*)"(?:.*?)"(?P=hashes))
    | (?P<string>(?:b|c)?"(?:\\.|[^"\\])*")
    | (?P<char>b?'(?:\\(?:x[0-9a-fA-F]{2}|u\{[^}]*\}|.)|[^\\'\n])')
    | (?P<lifetime>'[A-Za-z_]\w*)
    | (?P<word>(?:r\#)?[A-Za-z_]\w*)
    | (?P<number>\d\w*)
    | (?P<path_separator>::)
    | (?P<punctuation>.)
    """,
    re.VERBOSE | re.DOTALL,
)
BLOCK_COMMENT_EDGE = re.compile(r"/\*|\*/")


@dataclass(frozen=True)
class Token:
    """One token of code: its kind (a group name of `TOKEN`), its text and its line."""

    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class Path:
    """A path as the source names it.

    Attributes:
        segments: From the crate's root for paths into this crate (the first is then "crate"), else
            as written, such as ("std", "net", "TcpStream"). A glob's last segment is "*".
        line: Its line in the file.
        public: Whether it is re-exported by `pub use`.
        alias: The name after `as`, if there is one.
    """

    segments: tuple[str, ...]
    line: int
    public: bool = False
    alias: str | None = None

    def __str__(self) -> str:
        return "::".join(self.segments)


@dataclass
class RustSource:
    """The tokens, comments and paths of one file.

    Attributes:
        name: The file's place below `src`, such as "kernels/mod.rs".
        text: Its contents.
    """

    name: str
    text: str
    tokens: list[Token] = field(init=False)
    comments: dict[int, str] = field(init=False)
    paths: list[Path] = field(init=False)

    def __post_init__(self) -> None:
        self.comments = {}
        self.tokens = list(self._tokenize())
        self.paths = list(self._find_paths())

    @property
    def module(self) -> tuple[str, ...]:
        """The module that the file is, from the crate's root, without "crate"."""
        parts = PurePosixPath(self.name).with_suffix("").parts
        return parts[:-1] if parts[-1] in ("mod", "lib", "main") else parts

    def _tokenize(self) -> Iterator[Token]:
        position, line = 0, 1
        while position < len(self.text):
            match = TOKEN.match(self.text, position)
            assert match is not None, "the last alternative takes any character"
            kind = next(k for k in match.groupdict() if k != "hashes" and match[k] is not None)
            end = self._block_comment_end(match.end()) if kind == "block_comment" else match.end()
            text = self.text[position:end]
            if "comment" in kind:
                for offset, part in enumerate(text.split("\n")):
                    self.comments[line + offset] = self.comments.get(line + offset, "") + part
            elif kind != "space":
                yield Token(kind, text, line)
            line += text.count("\n")
            position = end

    def _block_comment_end(self, position: int) -> int:
        depth = 1
        while depth:
            edge = BLOCK_COMMENT_EDGE.search(self.text, position)
            if edge is None:
                return len(self.text)
            depth += 1 if edge[0] == "/*" else -1
            position = edge.end()
        return position

    def _find_paths(self) -> Iterator[Path]:
        """Yields every path with more than one segment, and every path of a `use`."""
        modules: list[tuple[int, str]] = []  # inline modules around here, with the depth of their brace
        depth = index = 0
        public = False
        while index < len(self.tokens):
            token = self.tokens[index]
            if token.text == "{":
                depth += 1
            elif token.text == "}":
                depth -= 1
                if modules and modules[-1][0] == depth:
                    modules.pop()
            elif token.text == "mod" and self._text(index + 2) == "{":
                modules.append((depth, self._text(index + 1)))
            elif token.text in ("use", "extern"):
                public = self._is_public(index)
                here = (*self.module, *(name for _, name in modules))
                if token.text == "extern" and self._text(index + 1) != "crate":
                    index += 1
                    continue
                index += 1 if token.text == "use" else 2
                found, index = self._tree(index, (), in_use=True)
                yield from (self._resolve(path, here, public) for path in found)
                continue
            elif self._starts_path(index):
                here = (*self.module, *(name for _, name in modules))
                found, index = self._tree(index, (), in_use=False)
                yield from (self._resolve(path, here, False) for path in found)
                continue
            index += 1

    def _text(self, index: int) -> str:
        return self.tokens[index].text if 0 <= index < len(self.tokens) else ""

    def _is_public(self, index: int) -> bool:
        """Whether `pub` or `pub(...)` stands before the token at `index`."""
        if self._text(index - 1) == ")":
            while index > 0 and self._text(index - 1) != "(":
                index -= 1
            index -= 1
        return self._text(index - 1) == "pub"

    def _starts_path(self, index: int) -> bool:
        if self._text(index) == "::":  # `::std::net`, but not `Vec::<u8>::new`
            return index == 0 or (self.tokens[index - 1].kind != "word" and self._text(index - 1) != ">")
        return self.tokens[index].kind == "word" and self._text(index + 1) == "::"

    def _tree(self, index: int, prefix: tuple[str, ...], in_use: bool) -> tuple[list[Path], int]:
        """Reads a path or `use` tree at `index`; returns its paths and the index after it."""
        segments = prefix
        if self._text(index) == "::":
            index += 1
        while index < len(self.tokens):
            token = self.tokens[index]
            if token.text == "{" and in_use:
                found: list[Path] = []
                index += 1
                while index < len(self.tokens) and self._text(index) != "}":
                    branch, index = self._tree(index, segments, in_use)
                    found += branch
                    if self._text(index) == ",":
                        index += 1
                    elif self._text(index) != "}":
                        break  # not a `use` tree after all
                return found, index + 1
            if token.kind != "word" and token.text != "*":
                break
            segments = (*segments, token.text.removeprefix("r#"))
            line = token.line
            index += 1
            if in_use and self._text(index) == "as":
                return [Path(segments, line, alias=self._text(index + 1))], index + 2
            if self._text(index) != "::":
                return [Path(segments, line)], index
            index += 1
        line = self.tokens[min(index, len(self.tokens) - 1)].line
        # `name::<T>` and the like: the path ends before what is no name.
        return ([Path(segments, line)] if segments != prefix else []), max(index, 1)

    def _resolve(self, path: Path, here: tuple[str, ...], public: bool) -> Path:
        first, *rest = path.segments
        if rest[-1:] == ["self"]:
            rest.pop()
        base = here
        if first == "self":
            pass
        elif first == "super":
            base = here[:-1]
            while rest[:1] == ["super"]:
                rest.pop(0)
                base = base[:-1]
        elif first in ("crate", "candle_llama"):
            base = ()
        else:
            return Path((first, *rest), path.line, public, path.alias)
        return Path(("crate", *base, *rest), path.line, public, path.alias)
