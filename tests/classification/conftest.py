"""Fixtures: a folder of small real images, some of them broken, a model for them, and a small classification."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastres
from tests.object_store import bucket, faults, gs, memory, proxy, s3_server

__all__ = ["bucket", "faults", "gs", "memory", "proxy", "s3_server"]

pa = pytest.importorskip("pyarrow")
pytest.importorskip("simplejpeg")
datasets = pytest.importorskip("sklearn.datasets")

BROKEN = {"d.jpg": b"", "h.jpg": b"not an image"}


@pytest.fixture(scope="session")
def model() -> fastres.Model:
    return fastres.load("resnet20_digits")


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Two photographs of 640 × 427, RGB."""
    return [Image.fromarray(image) for image in datasets.load_sample_images().images]


@pytest.fixture(scope="session")
def digits() -> list[Image.Image]:
    """1,797 scans of 8 × 8, grey."""
    return [Image.fromarray((image * (255 / 16)).astype("uint8")) for image in datasets.load_digits().images]


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def classify(source: Any, output: Path, model: fastres.Model, **options: Any) -> fastres.classification.Report:
    return fastres.classify(source, output, model=model, **{"batch_size": 5, "workers": 0, "progress": False} | options)


def failed(table: pa.Table) -> list[str]:
    rows = zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True)
    return [Path(path).name for path, error in rows if error is not None]


@pytest.fixture
def folder(tmp_path: Path, digits: list[Image.Image], photos: list[Image.Image]) -> Path:
    """24 files a.jpg … x.jpg: digits and photographs, three broken, the last in a subfolder; and other files."""
    place = tmp_path / "images"
    (place / "sub").mkdir(parents=True)
    for index, letter in enumerate("abcdefghijklmnopqrstuvwx"):
        image = photos[index // 8].resize((90 + index, 70)) if index % 8 == 5 and index < 16 else digits[index]
        path = place / ("sub" if letter == "x" else "") / f"{letter}.jpg"
        path.write_bytes(BROKEN.get(path.name, encoded(image.resize((40, 40)), quality=95)))
    whole = (place / "m.jpg").read_bytes()
    (place / "m.jpg").write_bytes(whole[: len(whole) // 2])
    (place / "notes.txt").write_text("no image")
    (place / ".hidden.jpg").write_bytes(b"no image")
    return place


ERRORS = ["d.jpg", "h.jpg", "m.jpg"]


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of folders that cannot be listed, even by root."""
    list_folder = os.scandir

    def refuse(path: Any = ".") -> Any:
        if os.path.basename(path) == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return "lost+found"
