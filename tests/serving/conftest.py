"""A server as a program of its own, with the bundled network, and real photographs to send to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastres
from fastres.bench.measure.watching import tree
from tests.classification.conftest import encoded

__all__ = ["PATIENCE", "Server", "encoded", "form", "serving"]

for package in ("litserve", "aiohttp", "prometheus_client", "pyarrow", "simplejpeg"):
    pytest.importorskip(package)
datasets = pytest.importorskip("sklearn.datasets")

NETWORK = "resnet20_digits"
PATIENCE = 60.0  # seconds; whatever takes longer hangs


class Server:
    """A server that has started. ``errors`` is the file of its standard error."""

    def __init__(self, process: subprocess.Popen[str], port: int, errors: Path) -> None:
        self.process, self.port, self.errors = process, port, errors

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Return status, content (from JSON if it is JSON) and headers of an answer, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            content: Any = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            if content and found.get("content-type") == "application/json":
                content = json.loads(content)
            return answer.status, content, found
        finally:
            connection.close()

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self.ask("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def number(self, name: str) -> float:
        """Return the value of a metric; 0 if it has labels that were not used yet."""
        _, text, _ = self.ask("GET", "/metrics")
        lines = [line.split() for line in text.decode().splitlines() if line.startswith(f"{name} ")]
        return float(lines[0][1]) if lines or "{" not in name else 0.0

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it does not happen"
            time.sleep(0.05)

    def processes(self, pattern: str = "") -> list[int]:
        """Return the processes under the server whose command line has ``pattern``."""
        return [pid for pid in tree(self.process.pid)[1:] if pattern in _command(pid)]

    def stop(self) -> None:
        """End the server in order, and check that it leaves nothing behind."""
        children = self.processes()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0
        self.until(lambda: not any(_is_running(pid) for pid in children))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@contextmanager
def serving(*options: str, **variables: str) -> Iterator[Server]:
    """Start a server with ``options`` and ``variables`` of the environment; end it with the context."""
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors.txt")
        with errors.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastres", "serve", NETWORK, "--port", "0", *options],
                stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            )  # fmt: skip
        killer = threading.Timer(2 * PATIENCE, process.kill)
        killer.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(f"Serving {NETWORK}"), errors.read_text()
            killer.cancel()
            server = Server(process, int(line.rstrip().rstrip("/").rpartition(":")[2]), errors)
            yield server
            if process.poll() is None:
                server.stop()
        finally:
            killer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server whose decoder gives the same pixels as ``model.predict``."""
    with serving("--decoder", "exact", "--workers", "2", "--max-bytes", "2000000", "--max-pixels", "4000000") as found:
        yield found
        assert "Traceback" not in found.errors.read_text()


@pytest.fixture(scope="session")
def model() -> fastres.Model:
    return fastres.load(NETWORK)


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A photograph of 640 × 427, RGB."""
    return Image.fromarray(datasets.load_sample_images().images[0])


def form(files: dict[str, bytes]) -> tuple[bytes, str]:
    """Return a form with ``files``, and its content type."""
    parts = [
        f'--border\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode() + content + b"\r\n"
        for name, content in files.items()
    ]
    return b"".join(parts) + b"--border--\r\n", "multipart/form-data; boundary=border"
