"""``fastres.quantize``: images from every source, the choice, the record, and errors before the work."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres.calibration import record_text
from fastres.errors import CalibrationError, CalibrationWarning, InputError, SourceError
from fastres.network.plan import Plan
from tests.test_process_settings import SETTINGS

Digits = list[tuple[Image.Image, int]]
FIXED: dict[str, Any] = {"method": "max", "workers": 0, "progress": False}


def quantize(model: Any, images: Any, **options: Any) -> Any:
    return fastres.quantize(model, images, **{**FIXED, **options})


def scales(model: Any) -> dict[str, float]:
    plan: Plan = model.plan
    assert plan.quantisation is not None
    return {name: scale.scale for name, scale in plan.quantisation.values.items()}


@pytest.fixture(scope="module")
def from_list(model: fastres.Model, digits: Digits) -> Any:
    return quantize(model, [image for image, _ in digits], labels=[label for _, label in digits])


def test_the_result_is_near_the_float_model_which_stays_as_it_was(from_list: Any, digits: Digits) -> None:
    fresh = fastres.load("resnet20_digits")
    state = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    x = fresh.transforms.batch([image for image, _ in digits])
    before = fresh(x)
    quantize(fresh, [image for image, _ in digits])
    assert torch.equal(fresh(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())
    error = (from_list(x) - before).norm() / before.norm()
    assert 0 < error < 0.05
    assert isinstance(from_list, fastres.Model)


def test_the_record_is_plain_data(from_list: Any, model: fastres.Model) -> None:
    record = json.loads(json.dumps(from_list.record))
    assert record["float32"]["model"] == "resnet20_digits"
    assert record["float32"]["weights"] == model.weights
    assert len(record["float32"]["state_sha256"]) == 64
    images = record["images"]
    assert (images["read"], images["skipped"], images["used"]) == (48, 0, 48)
    assert (images["measured"], images["chosen_on"], images["judged_on"]) == (24, 12, 12)
    assert record["agreement"]["images"] == 12
    assert record["agreement"]["logit_error"] < 0.05
    assert record["accuracy"] == {"images": 12, "float32": 1.0, "int8": 1.0}
    text = record_text(record)
    assert "calibrated on 48 of 48 images\nscales by max" in text
    assert "same best class 100.0%" in text
    assert "accuracy on these images: 100.00% in float32, 100.00% in 8 bit" in text


def test_images_that_cannot_be_read_are_named_and_counted(model: fastres.Model, folder: Path) -> None:
    (folder / "3" / "empty.png").write_bytes(b"")
    (folder / "4" / "text.jpg").write_bytes(b"no image")
    with pytest.warns(CalibrationWarning, match=r"2 of 50 calibration images .*3/empty\.png"):
        found = quantize(model, folder)
    assert found.record["images"]["skipped"] == 2
    assert "text.jpg" in found.record["images"]["reasons"][1]
    assert "48 of 50 images; 2 could not be read" in record_text(found.record)


def test_a_stream_skips_what_is_no_image(model: fastres.Model, digits: Digits) -> None:
    images = [image for image, _ in digits[:16]]
    broken = [np.full((8, 8), np.nan, np.float32), b"", "nowhere.png", [images[0]], None]
    with pytest.warns(CalibrationWarning, match=r"5 of 21 .*images\[16\]: .* holds NaN"):
        found = quantize(model, iter([*images, *broken]))
    assert found.record["images"]["used"] == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = torch.stack([model.transforms.pixels(image) for image in images])
        assert scales(quantize(model, batch)) == scales(found)


def test_a_sample_is_bounded(model: fastres.Model, digits: Digits) -> None:
    alive = []

    def stream() -> Iterator[np.ndarray[Any, Any]]:
        for number in range(200):
            yield np.roll(np.asarray(digits[number % len(digits)][0]), number // 50, axis=0)
            alive.append(number)

    found = quantize(model, stream(), samples=20)
    assert len(alive) == 200
    assert (found.record["images"]["read"], found.record["images"]["used"]) == (200, 20)


def test_any_kind_of_model_can_be_quantised(model: fastres.Model, digits: Digits) -> None:
    images = [image for image, _ in digits[:12]]
    named = quantize("resnet20_digits", images, keep=["stem", "head"])
    assert named.record["kept"] == ["stem", "head"]
    assert "2 steps are in float32: stem, head" in record_text(named.record)
    headless = quantize(fastres.load("resnet20", None, num_classes=0), images)
    assert headless.record["agreement"]["agreement"] is None
    assert headless(headless.transforms.batch(images)).shape == (12, 64)
    assert "outputs differ by" in record_text(headless.record)
    from fastres.bench.measure.calibration import calibrated

    module = calibrated(model.architecture)
    transforms = model.transforms
    assert quantize(module, images, transforms=transforms).num_classes == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method is 'best'; use 'auto', 'max'"),
        ({"keep": ["conv1"]}, "keep names 'conv1'"),
        ({"samples": 7}, "samples is 7; give a whole number of at least 8"),
        ({"samples": 10**6}, "takes more than 1 GiB at 32×32 pixels; give at most 349525"),
        ({"weight_limit": 128}, "weight_limit is 128; give at most 127"),
        ({"largest_error": 0}, "largest_error is 0"),
        ({"weights": "other.pth"}, "which has its own"),
        ({"labels": [11]}, r"labels\[0\] is 11"),
    ],
)
def test_arguments_are_checked_before_the_images_are_read(
    options: dict[str, Any], message: str, model: fastres.Model
) -> None:
    def images() -> Iterator[Any]:
        raise AssertionError("read")
        yield

    with pytest.raises(InputError, match=message):
        quantize(model, images(), **options)


def test_unusable_images_are_named(model: fastres.Model, digits: Digits, folder: Path, tmp_path: Path) -> None:
    one = digits[0][0]
    with pytest.raises(CalibrationError, match="3 usable images"):
        quantize(model, [image for image, _ in digits[:3]])
    with pytest.raises(CalibrationError, match="one colour only"):
        quantize(model, [Image.new("RGB", (9, 9), (number, 0, 0)) for number in range(20)])
    with pytest.raises(CalibrationError, match=r"0 usable images .*20 could not be read"):
        quantize(model, [None] * 20)
    with pytest.raises(InputError, match="images is one image"):
        quantize(model, one)
    with pytest.raises(InputError, match="cannot be a dict"):
        quantize(model, {"a": one})
    with pytest.raises(InputError, match="cannot be an int"):
        quantize(model, 7)
    with pytest.raises(SourceError, match="does not exist"):
        quantize(model, tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="no images"):
        quantize(model, tmp_path / "none")
    with pytest.raises(InputError, match="There are 3 labels for 48 images"):
        quantize(model, folder, labels=[1, 2, 3])
    (folder / "cats").mkdir()
    one.save(folder / "cats" / "a.png")
    with pytest.raises(InputError, match="not named as a class of the model: 'cats'"):
        quantize(model, folder, labels="folders")


def test_a_broken_network_is_named(digits: Digits) -> None:
    broken = fastres.load("resnet20_digits")
    with torch.no_grad():
        broken.get_parameter("layer2.1.conv1.weight")[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"weights of layer2\.1\.conv1 are NaN or infinite"):
        quantize(broken, [image for image, _ in digits])


def test_a_model_in_8_bit_is_refused(from_list: Any, digits: Digits, tmp_path: Path) -> None:
    for model in (from_list, str(from_list.save(tmp_path / "a.safetensors"))):
        with pytest.raises(InputError, match="resnet20_digits is in 8 bit already"):
            quantize(model, [image for image, _ in digits])


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_process_change_nothing(setting: str, from_list: Any, digits: Digits, tmp_path: Path) -> None:
    model = fastres.load("resnet20_digits")
    with SETTINGS[setting]():
        found = quantize(model, [image for image, _ in digits])
        found.save(tmp_path / "a.safetensors")
    assert scales(found) == scales(from_list)
    assert found.record["candidates"] == from_list.record["candidates"]
    x = model.transforms.batch([image for image, _ in digits[:4]])
    assert torch.equal(fastres.load(tmp_path / "a.safetensors")(x), from_list(x))
