"""``export_int8``: accuracy on digits not used for calibration, the report, and the errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres.bench.digits.data import as_image, load_scans, split
from fastres.errors import CalibrationError, FastresError, InputError
from fastres.executors.int8_steps import saturates
from fastres.quantisation.thresholds import METHODS

onnx = pytest.importorskip("onnx")

from fastres.export import onnx as fx  # noqa: E402
from fastres.export.errors import ExportFileError  # noqa: E402
from fastres.export.quantisation import export_int8  # noqa: E402
from fastres.export.runtime import Session  # noqa: E402

from .networks import digits_model  # noqa: E402


def training_images(count: int) -> list[Image.Image]:
    scans, digits = load_scans()
    train, _ = split(torch.from_numpy(digits))
    return [as_image(scans[i]) for i in train[:count].tolist()]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export_int8(digits_model(), tmp_path_factory.mktemp("int8") / "m.onnx", training_images(160), progress=False)


def test_accuracy_is_within_half_a_point_on_held_out_digits(quantised: Any) -> None:
    scans, digits = load_scans()
    _, held_out = split(torch.from_numpy(digits))
    images = [as_image(scans[i]) for i in held_out.tolist()]
    labels = digits[held_out.numpy()]

    def accuracy(predictions: list[Any]) -> float:
        return float(np.mean([row[0].index == label for row, label in zip(predictions, labels, strict=True)]))

    found = accuracy(Session(quantised.path, "cpu").predict(images, 1))
    assert found >= accuracy(digits_model().predict(images, 1)) - 0.005


def test_report_is_that_of_quantize(quantised: Any) -> None:
    limit = json.loads(fx.inspect(quantised.path).metadata["quantisation"])["largest_weight"]
    assert limit == (64 if saturates() else 127)
    model = fastres.quantize(digits_model(), training_images(160), weight_limit=limit, progress=False)
    assert (quantised.calibrated, quantised.judged) == (120, 40)
    assert quantised.agreement == model.record["agreement"]["agreement"] >= 0.95
    assert quantised.logit_error == pytest.approx(model.record["agreement"]["logit_error"])
    assert 0.001 < quantised.logit_error < 0.15
    assert f"{quantised.agreement:.1%}" in str(quantised)
    assert [check.batch for check in quantised.export.checks] == [1, 2, 5]
    # Measured branches have finer levels than those that are derived.
    branches = model.plan.quantisation.branches
    assert set(branches) == {f"layer{n}.{m}.conv2" for n in (1, 2, 3) for m in range(3)}


def test_metadata_says_where_the_scales_are_from(quantised: Any) -> None:
    metadata = fx.inspect(quantised.path).metadata
    assert (metadata["dtype"], metadata["opset"], metadata["model"]) == ("int8", "18", "resnet20_digits")
    record = json.loads(metadata["quantisation"])
    assert record["scales"]["images"]["measured"] == 80
    assert record["scales"]["float32"]["weights"].startswith("resnet20_digits DIGITS_V1")
    assert record["scales"]["method"] in METHODS
    assert Session(quantised.path, "cpu").metadata.class_names == tuple("0123456789")


def test_options_reach_the_quantiser_and_the_exporter(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index, image in enumerate(training_images(12)):
        image.save(images / f"{index}.png")
    options: dict[str, Any] = {"weight_limit": 64, "batch": 2, "preprocessing": True, "outputs": ("top_k",), "top_k": 2}
    report = export_int8(digits_model(), tmp_path / "m.onnx", images, progress=False, least_agreement=0, **options)
    assert (report.calibrated, report.judged) == (9, 3)
    inspection = fx.inspect(report.path)
    assert inspection.inputs[0].shape == (2, "height", "width", 3)
    assert [value.name for value in inspection.outputs] == ["top_k_scores", "top_k_indices"]
    assert json.loads(inspection.metadata["quantisation"])["largest_weight"] == 64


def test_disagreement_is_refused(tmp_path: Path) -> None:
    """Ten classes whose weights differ by less than a level: in 8 bit, rounding decides which is the best."""
    model = digits_model()
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = model.fc.weight.shape[1]
    common = torch.rand(width, generator=generator, dtype=torch.float32, device="cpu")
    common[0] = 1  # sets the scale of the levels
    apart = 0.2 / 127 * torch.randn(10, width, generator=generator, dtype=torch.float32, device="cpu")
    model.fc.weight.data.copy_((common + apart).clamp(max=1))
    model.fc.bias.data.zero_()
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(CalibrationError, match=r"same best class as float32 for \d+\.\d% of 10 images; at least 95"):
        export_int8(model, path, training_images(40), progress=False)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_bad_calibration_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Any, dict[str, Any], type[FastresError], str]] = [
        (tmp_path / "empty", {}, FastresError, "empty"),
        (tmp_path / "nowhere", {}, FastresError, "nowhere"),
        (training_images(4), {}, CalibrationError, "8"),
        (training_images(9), {"least_agreement": 2}, InputError, "least_agreement"),
        (training_images(9), {"dtype": "float16"}, InputError, "dtype"),
        (training_images(9), {"opset": 3}, InputError, "opset"),
        (training_images(9), {"weight_limit": 128}, InputError, "weight_limit"),
    ]
    (tmp_path / "out").mkdir()
    for images, options, kind, says in cases:
        with pytest.raises(kind, match=says):
            export_int8(digits_model(), tmp_path / "out" / "m.onnx", images, progress=False, **options)
    with pytest.raises(ExportFileError):
        export_int8(digits_model(), tmp_path / "no" / "m.onnx", training_images(1), progress=False)
    assert os.listdir(tmp_path / "out") == []
