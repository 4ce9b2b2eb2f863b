"""A stand-in for the Hugging Face hub on the loopback interface, with the endpoints that its client uses."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    """Files by path; a `gated` repository serves them only for requests with `TOKEN`."""

    files: dict[str, bytes]
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)
    etag: str | None = None
    """The ETag of all files, instead of a hash of each."""
    name: str | None = None
    """The commit's name, instead of a hash."""
    moved_to: str | None = None
    """Another server, to which requests for files are redirected."""

    @property
    def commit(self) -> str:
        """A hash of the content, as the hub's commits are."""
        if self.name is not None:
            return self.name
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """A running stand-in: its address, and the requests that it got."""

    url: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)

    @property
    def downloaded(self) -> set[str]:
        """The files whose content was downloaded."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path in self.requests
            if "/resolve/" in path and method == "GET"
        }


@contextmanager
def running(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serves repositories, by id, until the block ends."""
    hub = Hub("", repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            hub.authorizations.append(self.headers.get("Authorization"))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"] and len(parts) >= 4:
                self._answer_api("/".join(parts[2:4]), parts[4:])
            elif len(parts) >= 5 and parts[2] == "resolve":
                self._answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self._fail(404, "NotFound")

        def _repository(self, name: str, revision: str) -> Repository | None:
            repository = hub.repositories.get(name)
            if repository is None:
                self._fail(404, "RepoNotFound")
            elif revision not in (*repository.revisions, repository.commit):
                self._fail(404, "RevisionNotFound")
            else:
                return repository
            return None

        def _answer_api(self, name: str, rest: list[str]) -> None:
            repository = self._repository(name, rest[1] if len(rest) > 1 else "main")
            if repository is None:
                return
            if rest[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in repository.files.items()
                ]
                self._send_json(tree)
            else:
                siblings = [{"rfilename": path, "size": len(data)} for path, data in repository.files.items()]
                info = {"id": name, "sha": repository.commit, "siblings": siblings, "gated": repository.gated}
                self._send_json(info)

        def _answer_file(self, name: str, revision: str, path: str) -> None:
            repository = self._repository(name, revision)
            if repository is None:
                return
            if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._fail(403, "GatedRepo")
            elif path not in repository.files:
                self._fail(404, "EntryNotFound")
            else:
                data = repository.files[path]
                etag = hashlib.sha1(data).hexdigest() if repository.etag is None else repository.etag
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit}
                if repository.moved_to is None:
                    self._send(200, data, headers)
                else:
                    linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
                    self._send(302, b"", {**headers, **linked, "Location": repository.moved_to + self.path})

        def _fail(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"X-Error-Code": code})

        def _send_json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
