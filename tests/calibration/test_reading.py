"""Reading calibration images: every source gives the same pixels."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres.calibration.labels import Labels
from fastres.calibration.reading import read
from fastres.calibration.samples import Samples
from fastres.errors import SourceError
from fastres.terminal import progress_bar
from tests.object_store import upload

Digits = list[tuple[Image.Image, int]]


def samples(model: fastres.Model, images: Any, labels: Any = None, workers: int = 0) -> Samples:
    classes = None if labels is None else Labels(labels, model)
    return read(images, model.transforms, classes, 100, workers, progress_bar(disable=True))


def test_every_source_gives_the_same_pixels(model: fastres.Model, digits: Digits, folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, path in enumerate(files):
            tar.add(path, f"{number:03}.png")
    pq.write_table(pa.table({"image": [path.read_bytes() for path in files]}), tmp_path / "images.parquet")

    def stream() -> Iterator[Any]:
        for number, (image, _) in enumerate(digits):
            yield np.asarray(image) if number % 2 else files[number]

    expected = model.transforms.batch([image for image, _ in digits])
    for images in (files, tmp_path / "shard.tar", str(tmp_path / "images.parquet"), stream(), expected):
        assert torch.equal(samples(model, images).pixels, expected), images
    labels = [label for _, label in digits]
    assert samples(model, tmp_path / "shard.tar", labels).labels.tolist() == labels  # type: ignore[union-attr]
    for images in (folder, str(folder / "*" / "*.png"), [folder]):  # in the order of the folders
        found = samples(model, images, "folders")
        assert found.labels is not None
        assert found.labels.tolist() == sorted(labels)
        assert torch.equal(found.pixels, expected[torch.tensor(labels, device="cpu").argsort(stable=True)])


def test_files_are_read_by_other_processes(model: fastres.Model, folder: Path) -> None:
    assert torch.equal(samples(model, folder, workers=1).pixels, samples(model, folder).pixels)


def test_of_many_files_some_are_read(model: fastres.Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastres.calibration.reading.MOST_READ", 16)
    found = samples(model, folder, "folders")
    assert found.read == 16
    assert found.labels is not None
    assert {0, 9} <= set(found.labels.tolist())  # from the first folder to the last
    assert samples(model, folder, iter([1] * 48)).read == 48  # one label for each, in order


def test_images_in_an_object_store(model: fastres.Model, folder: Path, memory: str) -> None:
    upload(folder, memory)
    first = sorted(folder.rglob("*.png"))[:10]
    for local, remote in (
        (folder, memory),
        ([str(folder / "*" / "*.png")], [f"{memory}/*/*.png"]),
        (first, [f"{memory}/{path.relative_to(folder)}" for path in first]),
    ):
        expected, found = samples(model, local, "folders"), samples(model, remote, "folders", workers=1)
        assert torch.equal(found.pixels, expected.pixels)
        assert found.labels is not None
        assert expected.labels is not None
        assert torch.equal(found.labels, expected.labels)
    with pytest.raises(SourceError, match="does not exist"):
        samples(model, [f"{memory}/none.png", *map(str, first)])
