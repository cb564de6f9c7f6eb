"""Scans of digits as images with labels, and short timings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastres.bench.digits.data import as_image, load_digits, load_scans, split
from tests.object_store import memory

__all__ = ["memory"]


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scans that had no part in the training, in a folder for each digit."""
    folder = tmp_path_factory.mktemp("digits")
    scans, _ = load_scans()
    labels = load_digits()[1]
    for number in split(labels)[1].tolist():
        place = folder / str(int(labels[number]))
        place.mkdir(exist_ok=True)
        as_image(scans[number]).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def few(held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scans of each digit."""
    folder = tmp_path_factory.mktemp("few")
    for place in held_out.iterdir():
        (folder / place.name).mkdir()
        for path in sorted(place.iterdir())[:4]:
            shutil.copy(path, folder / place.name)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastres.evaluation.speed.SECONDS", 0.0)
    monkeypatch.setattr("fastres.evaluation.speed.TURN_SECONDS", 0.001)
