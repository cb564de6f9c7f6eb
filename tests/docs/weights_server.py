"""Serve published weights without a network: a copy of the package whose table lists random files, and a server.

A page runs the real code, with its download, its cache and its checks. Only the files differ, and the table that lists
them and their hashes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from fastres.bench.measure.calibration import calibrated
from fastres.network.architectures import get_architecture

from .blocks import ROOT

TABLE = Path("data") / "torchvision_weights.json"
SERVED = {"resnet18": ("IMAGENET1K_V1",), "resnet50": ("IMAGENET1K_V1", "IMAGENET1K_V2")}


def link_package(folder: Path) -> Path:
    """Make ``folder/fastres`` of links to this checkout's files, with the layout of the installed package."""
    package = folder / "fastres"
    (package / "data").mkdir(parents=True)
    for path in (ROOT / "fastres").iterdir():
        if path.name not in ("data", "__pycache__"):
            (package / path.name).symlink_to(path)
    for path in (ROOT / "fastres" / "data").iterdir():
        (package / "data" / path.name).symlink_to(path)
    return package


def publish_random_weights(package: Path, folder: Path) -> None:
    """Write calibrated random weights to ``folder``, and their names to the table of ``package``."""
    table: dict[str, dict[str, Any]] = json.loads((package / TABLE).read_text())
    for model, names in SERVED.items():
        for seed, name in enumerate(names):
            stream = io.BytesIO()
            torch.save(calibrated(get_architecture(model), seed).state_dict(), stream)
            digest = hashlib.sha256(stream.getbuffer()).hexdigest()[:8]
            table[model][name]["file"] = f"{model}-{digest}.pth"
            (folder / table[model][name]["file"]).write_bytes(stream.getbuffer())
    (package / TABLE).unlink()
    (package / TABLE).write_text(json.dumps(table))


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve ``folder`` on a loopback server and yield its URL."""
    handler = functools.partial(_QuietHandler, directory=os.fspath(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
