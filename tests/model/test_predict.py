"""``model.predict``: takes images, returns classes in descending order of probability."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres.bench.measure.calibration import pixels, smooth_images
from fastres.errors import ImageError, InputError
from tests.executors.test_cpu import torchvision_module


@pytest.fixture(scope="module")
def model() -> fastres.Model:
    return fastres.from_module(torchvision_module("resnet18"))


def test_kinds_of_images_agree(model: fastres.Model, tmp_path: Path) -> None:
    array = pixels(smooth_images(1, 300, 280))[0].permute(1, 2, 0).numpy()
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    kinds = [path, str(path), Image.fromarray(array), array, torch.from_numpy(array).permute(2, 0, 1)]
    together = model.predict(kinds, top_k=3)
    assert len(together) == len(kinds)
    assert all(len(row) == 3 for row in together)
    for kind, row in zip(kinds, together, strict=True):
        alone = model.predict(kind, top_k=3)
        assert [p.index for p in alone] == [p.index for p in row] == [p.index for p in together[0]]
        assert row[0].score >= row[1].score >= row[2].score > 0
        np.testing.assert_allclose([p.score for p in alone], [p.score for p in row], rtol=1e-4)


def test_is_transforms_then_softmax(model: fastres.Model) -> None:
    image = Image.fromarray(pixels(smooth_images(1, 256, 256))[0].permute(1, 2, 0).numpy())
    scores = model(model.transforms(image)[None]).softmax(1)[0]
    row = model.predict(image, top_k=1000)
    assert len(row) == 1000
    assert sum(p.score for p in row) == pytest.approx(1, abs=1e-4)
    for prediction in row[:20]:
        assert prediction.score == pytest.approx(float(scores[prediction.index]), rel=1e-3)
        assert prediction.label == f"class {prediction.index}"


def test_batches_give_what_single_images_give() -> None:
    model = fastres.load("resnet20_digits")
    arrays = [pixels(smooth_images(1, 40, 40, seed=i))[0].permute(1, 2, 0).numpy() for i in range(7)]
    rows = model.predict(arrays, batch_size=3)
    for array, row in zip(arrays, rows, strict=True):
        alone = model.predict(array)
        assert [p.label for p in row] == [p.label for p in alone]


def test_numbers_of_numpy() -> None:
    model = fastres.load("resnet20_digits")
    images = [np.zeros((40, 40, 3), dtype=np.uint8)] * 3
    rows = model.predict(images, top_k=np.int64(3), batch_size=np.int32(2))  # type: ignore[arg-type]
    assert [len(row) for row in rows] == [3, 3, 3]


@pytest.mark.parametrize(("name", "value"), [("top_k", 0), ("top_k", 2.5), ("batch_size", -1), ("top_k", True)])
def test_bad_numbers(name: str, value: object) -> None:
    model = fastres.load("resnet20_digits")
    with pytest.raises(InputError, match=f"{name} is {value!r}; give a whole number of at least 1"):
        model.predict(np.zeros((8, 8, 3), dtype=np.uint8), **{"top_k": 1, name: value})  # type: ignore[arg-type]


def test_bad_images_are_named(tmp_path: Path) -> None:
    model = fastres.load("resnet20_digits")
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    with pytest.raises(ImageError, match=r"notes\.txt"):
        model.predict(text)
