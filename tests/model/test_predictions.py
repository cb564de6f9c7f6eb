"""What ``predict`` returns for one image and for many: a result that prints, indexes and turns into plain data."""

from __future__ import annotations

import gc
import io
import json
import pickle
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres.model.predictions import Prediction, Predictions

PHOTO = np.random.default_rng(3).integers(0, 256, (50, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> fastres.Model:
    return fastres.load("resnet20_digits")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_one_image_gives_one_result(model: fastres.Model, file: Path) -> None:
    tensor = torch.from_numpy(PHOTO).permute(2, 0, 1)
    for image in (str(file), file, file.read_bytes(), io.BytesIO(file.read_bytes()), Image.open(file), PHOTO, tensor):
        found = model.predict(image, top_k=3)
        assert type(found) is Predictions
        assert found.top1 is found[0]
        assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
        assert len(found) == len(found[:2]) + 1 == 3
        assert isinstance(found[:2], Predictions)


def test_many_images_give_a_list(model: fastres.Model, file: Path) -> None:
    tensor = torch.from_numpy(PHOTO).permute(2, 0, 1)
    for images, one in (([PHOTO], PHOTO), ((PHOTO,), PHOTO), (iter([PHOTO]), PHOTO), (PHOTO[None], PHOTO),
                        ([tensor], tensor), (tensor[None], tensor)):  # fmt: skip
        assert model.predict(images) == [model.predict(one)]
    assert model.predict([]) == []
    assert [found.name for found in model.predict([file, PHOTO, file.open("rb")])] == [str(file), None, str(file)]


def test_plain_data_is_json() -> None:
    found = Predictions((Prediction("cat", 3, 0.75), Prediction("dog", 5, float("nan"))), "a/cat.jpg")
    expected = {
        "image": "a/cat.jpg",
        "predictions": [{"label": "cat", "index": 3, "score": 0.75}, {"label": "dog", "index": 5, "score": None}],
    }
    assert found.to_dict() == expected
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == expected
    assert Predictions(()).to_dict() == {"image": None, "predictions": []}


def test_text() -> None:
    ranked = tuple(Prediction(f"kind {i}", i, 1 / (i + 2)) for i in range(4))
    found = Predictions(ranked, "cat.jpg")
    assert str(found).splitlines()[:2] == ["cat.jpg", "   50.00%  kind 0"]
    assert repr(found) == "Predictions(kind 0 50.0%, kind 1 33.3%, kind 2 25.0%, …)"


def test_a_notebook_shows_the_picture_and_escapes_names(model: fastres.Model, file: Path) -> None:
    for image in (file, Image.open(file), PHOTO, io.BytesIO(file.read_bytes())):
        html = model.predict(image)._repr_html_()
        assert "<img src='data:image/jpeg;base64," in html
    hostile = Predictions((Prediction("<b>'\"&", 0, 1.0),), "<script>.jpg")._repr_html_()
    assert "<script>" not in hostile
    assert "<b>'" not in hostile
    assert "&lt;b&gt;" in hostile
    assert "<img" not in hostile, "an image that is no longer there"
    assert not re.search(r"<img", model.predict([PHOTO])[0]._repr_html_())


def test_results_of_a_list_keep_no_pixels_alive(model: fastres.Model) -> None:
    image = PHOTO.copy()
    kept = weakref.ref(image)
    found = model.predict([image, image])
    del image
    gc.collect()
    assert kept() is None
    assert len(found) == 2


def test_results_can_be_pickled(model: fastres.Model, file: Path) -> None:
    for image in (file, Image.open(file), PHOTO, file.open("rb")):
        found = model.predict(image)
        assert pickle.loads(pickle.dumps(found)) == found
