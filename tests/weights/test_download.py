"""Downloads from a loopback server: the cache, and everything that can go wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.errors import CorruptCheckpointError, DownloadError, WeightsError
from fastres.network.architectures import get_architecture
from fastres.weights import download, published
from fastres.weights.download import cache_folder, cached_checkpoint, file_sha256
from fastres.weights.published import WeightsEntry
from fastres.weights.state import load_state

from .state_dicts import distinct_state, same

RESNET20 = get_architecture("resnet20")


class CheckpointServer(ThreadingHTTPServer):
    """Serves ``files``. ``fault`` is how it fails: ``cut`` (closes half-way), ``reset``, ``stall``, or not at all.

    With ``meeting``, every answer waits until that many requests have arrived.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.fault = ""
        self.length = True
        self.meeting: threading.Barrier | None = None
        self.requests: list[tuple[str, str | None]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/models"


class _Handler(BaseHTTPRequestHandler):
    server: CheckpointServer

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, self.headers["User-Agent"]))
        content = server.files.get(self.path.removeprefix("/models/"))
        if content is None:
            self.send_error(404)
            return
        if server.meeting is not None:
            server.meeting.wait(timeout=120)
        self.send_response(200)
        if server.length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not server.fault:
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if server.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif server.fault == "stall":
            server.released.wait(timeout=60)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CheckpointServer]:
    """A running server from which fastres downloads, into an empty cache."""
    server = CheckpointServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("FASTRES_WEIGHTS_URL", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return distinct_state("resnet20")


@pytest.fixture
def entry(server: CheckpointServer, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> WeightsEntry:
    """Published weights of ResNet-20, on the server."""
    stream = io.BytesIO()
    torch.save(state, stream)
    digest = hashlib.sha256(stream.getvalue()).hexdigest()[:8]
    entry = dataclasses.replace(
        published.get_entry("resnet18", "DEFAULT"), model="resnet20", file=f"resnet20-{digest}.pth", sha256=digest
    )
    server.files[entry.file] = stream.getvalue()
    monkeypatch.setattr(published, "entries", lambda model: {entry.name: entry} if model == "resnet20" else {})
    return entry


def left_in_cache() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir()) if cache_folder().exists() else []


def load(progress: bool = False) -> dict[str, Tensor]:
    return load_state(RESNET20, "DEFAULT", progress=progress).state


def test_weights_are_downloaded_once(server: CheckpointServer, entry: WeightsEntry, state: dict[str, Tensor]) -> None:
    assert same(load(), state)
    assert left_in_cache() == [entry.file]
    server.files.clear()
    loaded = load_state(RESNET20, "IMAGENET1K_V1")
    assert same(loaded.state, state)
    assert loaded.entry == entry
    assert [path for path, _ in server.requests] == [f"/models/{entry.file}"]
    assert str(server.requests[0][1]).startswith("fastres/")


def test_the_cache_is_torchs(entry: WeightsEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    path = tmp_path / "torch" / "hub" / "checkpoints" / entry.file
    assert path.is_file()
    assert cached_checkpoint(entry.file, entry.sha256) == path == Path(torch.hub.get_dir()) / "checkpoints" / entry.file
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere" / "hub" / "checkpoints"
    assert left_in_cache() == []


def test_a_cached_file_is_as_readable_as_any_other(entry: WeightsEntry, tmp_path: Path) -> None:
    load()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((cache_folder() / entry.file).stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_a_bar_in_bytes_is_shown_where_asked(entry: WeightsEntry, capsys: pytest.CaptureFixture[str]) -> None:
    load(progress=False)
    assert capsys.readouterr() == ("", "")
    (cache_folder() / entry.file).unlink()
    load(progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{entry.file}: 100%" in err
    assert "1.07M/1.07M" in err  # MiB
    load(progress=True)
    assert capsys.readouterr() == ("", ""), "a cached file needs no bar"


def test_a_tampered_cached_file_is_refused_and_kept(server: CheckpointServer, entry: WeightsEntry) -> None:
    load()
    path = cache_folder() / entry.file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()[:8]
    with pytest.raises(
        CorruptCheckpointError, match=rf"{path} is not the published.*{digest}, not {entry.sha256}.*delete"
    ):
        load()
    assert path.read_bytes() == content
    path.unlink()
    load()
    assert len(server.requests) == 2


def test_a_truncated_cached_file_is_refused(entry: WeightsEntry) -> None:
    load()
    path = cache_folder() / entry.file
    os.truncate(path, 1000)
    with pytest.raises(CorruptCheckpointError, match=r"delete the file"):
        load()


def test_what_is_cached_but_no_file_is_named(entry: WeightsEntry) -> None:
    (cache_folder() / entry.file).mkdir(parents=True)
    with pytest.raises(WeightsError, match=rf"{entry.file} cannot be read"):
        load()


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_a_download_that_breaks_off_leaves_nothing(server: CheckpointServer, entry: WeightsEntry, fault: str) -> None:
    server.fault = fault
    with pytest.raises(DownloadError, match=rf"{entry.file} (stopped after|broke off).*weights=<path>") as raised:
        load()
    if fault == "cut":
        total = len(server.files[entry.file])
        assert f"{total // 2:,} of {total:,} bytes" in str(raised.value)
    assert left_in_cache() == []
    server.fault = ""
    load()
    assert left_in_cache() == [entry.file]


def test_a_server_that_falls_silent_is_given_up(
    server: CheckpointServer, entry: WeightsEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 10 <= download.TIMEOUT <= 60
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.fault = "stall"
    with pytest.raises(DownloadError, match=r"broke off .*timed out"):
        load()
    assert left_in_cache() == []


def test_without_a_length_the_hash_finds_a_cut_file(server: CheckpointServer, entry: WeightsEntry) -> None:
    server.length, server.fault = False, "cut"
    with pytest.raises(CorruptCheckpointError, match=r"are not .*Nothing was kept"):
        load()
    assert left_in_cache() == []
    server.fault = ""
    load()


def test_other_bytes_than_published_are_refused(server: CheckpointServer, entry: WeightsEntry) -> None:
    server.files[entry.file] = b"<html>Please log in to the network</html>"
    with pytest.raises(CorruptCheckpointError, match=rf"The 41 bytes from .*{entry.file} are not .*proxy"):
        load()
    assert left_in_cache() == []


def test_an_http_error_is_named(server: CheckpointServer, entry: WeightsEntry) -> None:
    server.files.clear()
    with pytest.raises(DownloadError, match=rf"{server.url}/{entry.file}: the server answered 404 Not Found"):
        load()
    assert left_in_cache() == []


def test_offline_says_what_to_do(
    server: CheckpointServer, entry: WeightsEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("FASTRES_WEIGHTS_URL", url)
        with pytest.raises(DownloadError) as raised:
            load()
    message = str(raised.value)
    for part in (entry.file, f"{url}/{entry.file}", str(cache_folder()), "Connection refused", "weights=<path>"):
        assert part in message
    assert isinstance(raised.value, OSError)
    assert left_in_cache() == []


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://127.0.0.1:port/", "gopher://127.0.0.1/"])
def test_an_impossible_address_is_a_download_error(
    entry: WeightsEntry, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("FASTRES_WEIGHTS_URL", url)
    with pytest.raises(DownloadError, match=rf"{entry.file} is not in the cache folder"):
        load()
    assert left_in_cache() == []


def test_a_folder_serves_as_a_mirror(
    server: CheckpointServer, entry: WeightsEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / entry.file).write_bytes(server.files[entry.file])
    monkeypatch.setenv("FASTRES_WEIGHTS_URL", (tmp_path / "mirror").as_uri())
    load()
    assert left_in_cache() == [entry.file]
    assert server.requests == []


def test_a_cache_that_cannot_be_made_is_named_before_anything_is_fetched(
    server: CheckpointServer, entry: WeightsEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot be written to the cache folder .*TORCH_HOME"):
        load()
    assert server.requests == []


def test_an_interrupted_download_leaves_nothing(
    server: CheckpointServer, entry: WeightsEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert left_in_cache() == []


FULL_DISK = """
import resource, sys
from fastres.weights.download import cached_checkpoint
from fastres.errors import DownloadError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond fails as on a full disk
try:
    cached_checkpoint(sys.argv[1], sys.argv[2], progress=False)
except DownloadError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_full_disk_is_named(server: CheckpointServer, entry: WeightsEntry) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, entry.file, entry.sha256], capture_output=True, text=True, check=True
    )
    assert f"{entry.file} cannot be written to the cache folder {cache_folder()} (File too large)" in done.stdout
    assert left_in_cache() == []


DOWNLOAD = """
import sys
from fastres.weights.download import cached_checkpoint
from fastres.weights.checkpoints import read_checkpoint
print(len(read_checkpoint(cached_checkpoint(sys.argv[1], sys.argv[2]))))
"""


def test_two_processes_may_download_at_once(
    server: CheckpointServer, entry: WeightsEntry, state: dict[str, Tensor]
) -> None:
    server.meeting = threading.Barrier(2)  # neither gets an answer before both have asked
    command = [sys.executable, "-c", DOWNLOAD, entry.file, entry.sha256]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == str(len(state))
        assert "100%" in err
    assert len(server.requests) == 2
    assert left_in_cache() == [entry.file]
    server.meeting = None
    assert same(load(), state)
    assert len(server.requests) == 2


def test_hashes_are_those_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1):
        content = os.urandom(size)
        path.write_bytes(content)
        assert file_sha256(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, "https://download.pytorch.org/models/"),
        ("", "https://download.pytorch.org/models/"),
        ("https://mirror.example/a", "https://mirror.example/a/"),
        ("https://mirror.example/a/", "https://mirror.example/a/"),
    ],
)
def test_the_address_is_pytorchs_or_the_environments(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: str
) -> None:
    monkeypatch.delenv("FASTRES_WEIGHTS_URL", raising=False)
    if variable is not None:
        monkeypatch.setenv("FASTRES_WEIGHTS_URL", variable)
    assert download.base_url() == expected
