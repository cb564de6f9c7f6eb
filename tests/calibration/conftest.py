"""Fixtures: a folder of digits, one folder per class, and the bundled network for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import fastres
from fastres.bench.digits.data import as_image, load_digits, load_scans, split
from tests.object_store import memory

__all__ = ["memory"]

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")

COUNT = 48


@pytest.fixture(scope="session")
def model() -> fastres.Model:
    return fastres.load("resnet20_digits")


@pytest.fixture(scope="session")
def digits() -> list[tuple[Image.Image, int]]:
    """Scans of the training part and their classes."""
    scans, classes = load_scans()
    train, _ = split(load_digits()[1])
    return [(as_image(scans[index]), int(classes[index])) for index in train[:COUNT].tolist()]


@pytest.fixture
def folder(tmp_path: Path, digits: list[tuple[Image.Image, int]]) -> Path:
    """A folder of scans, each in the folder of its class."""
    place = tmp_path / "digits"
    for number, (image, label) in enumerate(digits):
        (place / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(place / str(label) / f"{number:03}.png")
    return place
