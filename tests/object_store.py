"""An S3 server on loopback, and a proxy in front of it that breaks requests as asked; fixtures for several folders."""

from __future__ import annotations

import http.client
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fastres.storage import failures, filesystems, objects

BUCKET = "photographs"
UNAVAILABLE, RESET, CUT, DENIED, EXPIRED = "unavailable", "reset", "cut", "denied", "expired"
_CODES = {UNAVAILABLE: (503, "SlowDown"), DENIED: (403, "AccessDenied"), EXPIRED: (400, "ExpiredToken")}

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()  # until the tests end
"""

Fault = Callable[[str, str], "str | None"]  # method and path of a request → what happens to it


class Faults:
    """Breaks requests: ``fault`` says how. ``log`` has the requests: method, path and header ``Range``."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.fault: Fault = lambda method, path: None
        self.log: list[tuple[str, str, str | None]] = []
        self._lock = threading.Lock()

    def decide(self, method: str, path: str, range_: str | None) -> str | None:
        with self._lock:
            self.log.append((method, path, range_))
            return self.fault(method, path)

    def first(self, count: int, kind: str, method: str = "GET") -> None:
        """Break the first ``count`` requests for each path."""
        seen: dict[str, int] = {}

        def fault(asked: str, path: str) -> str | None:
            if asked != method:
                return None
            seen[path] = seen.get(path, 0) + 1
            return kind if seen[path] <= count else None

        self.fault = fault


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.faults.decide(self.command, self.path, self.headers.get("Range"))
        if kind == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if kind in _CODES:
            status, code = _CODES[kind]
            text = f"<Error><Code>{code}</Code><Message>as the test wants</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else text)
            return
        connection = http.client.HTTPConnection(self.faults.target.hostname or "", self.faults.target.port, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        headers = {name: value for name, value in answer.getheaders() if name.lower() != "transfer-encoding"}
        self._answer(answer.status, headers, answer.read(), cut=kind == CUT)
        connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length") or str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server in another process; the credentials for it are in the environment."""
    for package in ("moto", "s3fs"):
        pytest.importorskip(package)
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    with _environment(
        AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1", AWS_PROFILE=None,
        AWS_EC2_METADATA_DISABLED="true", AWS_ENDPOINT_URL=address, no_proxy="127.0.0.1", NO_PROXY="127.0.0.1",
        AWS_CONFIG_FILE="/dev/null", AWS_SHARED_CREDENTIALS_FILE="/dev/null",
    ):  # fmt: skip
        yield address
    server.kill()
    server.communicate()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket; failures are retried without a wait."""
    monkeypatch.setattr(failures, "PAUSE", 0.0)
    call = filesystems.filesystem(f"s3://{BUCKET}").call_s3
    call("create_bucket", Bucket=BUCKET)
    yield f"s3://{BUCKET}"
    if left := [{"Key": each["Key"]} for each in call("list_objects_v2", Bucket=BUCKET).get("Contents", [])]:
        call("delete_objects", Bucket=BUCKET, Delete={"Objects": left})
    call("delete_bucket", Bucket=BUCKET)


@pytest.fixture(scope="session")
def proxy(s3_server: str) -> Iterator[tuple[Faults, str]]:
    """A proxy in front of the server, and its address."""
    faults = Faults(s3_server)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"faults": faults}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield faults, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def faults(bucket: str, proxy: tuple[Faults, str], monkeypatch: pytest.MonkeyPatch) -> Faults:
    """The faults of a proxy, which all requests of the test pass through. There are none yet."""
    faults, address = proxy
    faults.fault = lambda method, path: None
    faults.log.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    return faults


def upload(folder: Path, url: str, inside: str = "") -> None:
    """Write files below ``folder`` as objects below ``url``: all, or those in the folder that ``inside`` names."""
    fixed = re.split(r"[*?\[]", inside)[0]
    top = folder / (fixed if fixed == inside else fixed.rpartition("/")[0])
    for path in [top] if top.is_file() else top.rglob("*"):
        if path.is_file():
            objects.write(f"{url}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty place in memory."""
    monkeypatch.setattr(failures, "PAUSE", 0.0)
    fs = filesystems.filesystem("memory://place")

    def empty() -> None:
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]  # folders, which stay when their files have gone

    empty()
    yield "memory://place"
    empty()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket of an emulator of Google Cloud Storage."""
    pytest.importorskip("gcsfs")
    monkeypatch.setattr(failures, "PAUSE", 0.0)
    server = pytest.importorskip("gcp_storage_emulator.server")
    running = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    running.start()
    port = running._api._httpd.server_address[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"gs://{BUCKET}"
    running.stop()
