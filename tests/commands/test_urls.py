"""``fastres predict --allow-urls``: images from a server, and servers that fail."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastres.commands import urls
from fastres.commands.cli import main


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(file, "png")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert self.headers["User-Agent"].startswith("fastres/")
        if self.path == "/moved.png":
            self.answer(302, b"", Location="/cat.png")
        elif self.path == "/to-a-file":
            self.answer(302, b"", Location="file:///etc/hostname")
        elif self.path == "/cut.png":
            self.send_response(200)
            self.send_header("Content-Length", str(len(picture()) + 100))
            self.end_headers()
            self.wfile.write(picture())
        elif self.path in ("/cat.png", "/a%20b.png?size=1"):
            self.answer(200, picture())
        elif self.path == "/page.html":
            self.answer(200, b"<html>not a picture</html>")
        else:
            self.answer(404, b"nothing here")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def rows(given: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    status = main(["predict", *given, "--allow-urls", "--model", "resnet20_digits", "--top-k", "1", "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_images_from_urls(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"{server}/{name}" for name in ("cat.png", "moved.png", "a%20b.png?size=1")]
    status, found = rows(given, capsys)
    assert status == 0
    assert [row["image"] for row in found] == given
    assert len({json.dumps(row["predictions"]) for row in found}) == 1


def test_what_cannot_be_downloaded_is_a_row_with_an_error(
    server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {
        f"{server}/none.png": "the server answered 404 Not Found",
        f"{server}/cut.png": "the connection ended 100 bytes too early",
        f"{server}/to-a-file": "cannot be downloaded: the server answered 302",
        f"{server}/page.html": "page.html' is not an image",
        "http://127.0.0.1:9/x.png": "cannot be downloaded: Connection refused",
        "http://[::1/x.png": "cannot be downloaded",
        "https:/one-slash.png": "is not a URL that predict downloads",
        "s3://bucket/x.png": "'fastres classify', which reads s3://",
        f"{server}/cat.png": "",
    }
    status, found = rows(list(expected), capsys)
    assert status == 1
    for row, (name, words) in zip(found, expected.items(), strict=True):
        assert row["image"] == name
        assert words in row.get("error", "")
        assert bool(row["predictions"]) == (not words), name
    monkeypatch.setattr(urls, "LARGEST", 50)
    status, found = rows([f"{server}/cat.png"], capsys)
    assert "has more than 50 bytes" in found[0]["error"]


def test_without_permission_nothing_is_downloaded(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", f"{server}/cat.png", "--model", "resnet20_digits"]) == 1
    assert capsys.readouterr().err == f"fastres: '{server}/cat.png' is a URL; add --allow-urls to download it\n"
