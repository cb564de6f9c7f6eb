"""A small Hugging Face hub on loopback: what ``huggingface_hub`` asks of the real one to download a file of a model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

ID = "someone/small-resnet"
PROCESSOR = {"feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "size": 96, "crop_pct": 0.875}
LARGE = (".safetensors", ".bin")  # what the real hub keeps in LFS, on another host

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits, each with files by name, and the branches and tags that lead to them. A ``token`` makes it private."""

    commits: dict[str, Files] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    token: str | None = None

    def commit(self, files: Files, revision: str = "main") -> str:
        """Add a commit, and let ``revision`` lead to it; return its hash."""
        content = repr((sorted(files.items()), len(self.commits))).encode()
        name = hashlib.sha1(content).hexdigest()
        self.commits[name] = files
        self.revisions[revision] = name
        return name


class HubServer(ThreadingHTTPServer):
    """The hub. ``requests`` has the method and the path of every request.

    ``fail(path)`` can return a status and an ``X-Error-Code`` with which a request fails. ``cuts`` is how many answers
    with large files break off half-way, ``size`` replaces the size of large files, and ``released`` ends a ``stall``.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.agents: set[str] = set()
        self.fail: Any = lambda path: None
        self.cuts = 0
        self.size: int | None = None
        self.stall = False
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def files(self) -> list[str]:
        """The names of the files that were sent or looked at, in order and without repetitions."""
        return list(dict.fromkeys(path.rpartition("/")[2] for _, path in self.requests if "/cdn/" not in path))


@contextmanager
def running() -> Iterator[HubServer]:
    """Run a hub within the context."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask the hub at ``url``, as with HF_ENDPOINT, which it reads when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def commit_of(hub: HubServer, revision: str = "main") -> str:
    """Return the hash of the commit of the model to which ``revision`` leads."""
    return hub.repositories[ID].revisions[revision]


def complete(cache: Path) -> set[str]:
    """Return the names of the files in the cache that are taken for complete."""
    return {path.name for path in cache.rglob("snapshots/*/*")}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        if self.path.startswith("/api/"):  # huggingface_hub's own questions
            self.refuse(404)
            return
        server.requests.append((self.command, self.path))
        server.agents.add(self.headers["User-Agent"] or "")
        if server.stall:
            server.released.wait(timeout=60)
        failure = server.fail(self.path)
        if failure is not None:
            self.refuse(*failure)
        elif self.path.startswith("/cdn/"):
            self.send_large(self.path.rpartition("/")[2])
        else:
            self.resolve()

    def refuse(self, status: int, code: str | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, **({"X-Error-Code": code} if code else {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def resolve(self) -> None:
        owner, name, _, revision, file = self.path.removeprefix("/").split("/", 4)
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None or repository.token not in (None, (self.headers["Authorization"] or "")[7:]):
            self.refuse(401, "RepoNotFound")
            return
        revision = unquote(revision)
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            self.refuse(404, "RevisionNotFound")
            return
        content = repository.commits[commit].get(file)
        if content is None:
            self.refuse(404, "EntryNotFound", X_Repo_Commit=commit)
            return
        large = file.endswith(LARGE)
        digest = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        self.send_response(302 if large else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{digest}"')
        if large:
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/cdn/{digest}")
            self.send_header("X-Linked-ETag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(self.server.size or len(content)))
        self.send_header("Content-Length", "0" if large else str(len(content)))
        self.end_headers()
        if self.command == "GET" and not large:
            self.wfile.write(content)

    def send_large(self, digest: str) -> None:
        contents = (c for r in self.server.repositories.values() for f in r.commits.values() for c in f.values())
        content = next(c for c in contents if hashlib.sha256(c).hexdigest() == digest)
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(content[start : (start + len(content)) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])
