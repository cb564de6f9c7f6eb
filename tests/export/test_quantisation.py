"""INT8 files: accuracy on digits not used for calibration, the places of quantise/dequantise pairs, and the errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastres.bench.digits.data import as_image, load_scans, split
from fastres.errors import FastresError, ImageError, InputError

onnx = pytest.importorskip("onnx")

from fastres.export import onnx as fx  # noqa: E402
from fastres.export.errors import CalibrationError, ExportFileError  # noqa: E402
from fastres.export.quantisation import export_int8, find_images  # noqa: E402
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


def test_report_says_what_was_measured(quantised: Any) -> None:
    assert (quantised.calibrated, quantised.judged, quantised.held_out) == (120, 40, True)
    images = training_images(160)[3::4]
    model = digits_model()
    x = torch.stack([model.transforms(image) for image in images])
    found, expected = Session(quantised.path, "cpu")(x)["logits"], model(x)
    assert quantised.agreement == float((found.argmax(1) == expected.argmax(1)).float().mean())
    assert quantised.logit_error == pytest.approx(float((found - expected).norm() / expected.norm()), rel=1e-3)
    assert 0.001 < quantised.logit_error < 0.15
    assert f"{quantised.agreement:.1%}" in str(quantised)


def test_pairs_are_symmetric_int8_and_stand_on_the_residual(quantised: Any) -> None:
    model = onnx.load(quantised.path)
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    kinds = {"Conv": 21, "Add": 9, "Gemm": 1}
    for kind, count in kinds.items():
        nodes = [node for node in model.graph.node if node.op_type == kind]
        assert len(nodes) == count
        for node in nodes:
            assert [producers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2, node.name
    for node in model.graph.node:
        if node.op_type == "Conv":
            scale = constants[producers[node.input[1]].input[1]]
            weight = constants[producers[node.input[1]].input[0]]
            assert weight.dtype == np.int8
            assert scale.shape == (weight.shape[0],)
        if node.op_type == "Relu":
            assert producers[node.input[0]].op_type in ("Conv", "Add")
        if node.op_type == "QuantizeLinear":
            zero = constants[node.input[2]]
            assert (zero.dtype, int(zero)) == (np.int8, 0)


def test_metadata_survives(quantised: Any) -> None:
    metadata = fx.inspect(quantised.path).metadata
    assert (metadata["quantisation"], metadata["weights"], metadata["opset"]) == ("int8", "DIGITS_V1", "18")
    assert Session(quantised.path, "cpu").metadata.class_names == tuple("0123456789")


def test_a_folder_is_searched(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for index, image in enumerate(training_images(5)):
        folder = images / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    (images / "notes.txt").write_text("no image")
    assert [path.name for path in find_images(images)] == ["0.png", "2.png", "4.png", "1.png", "3.png"]
    report = export_int8(digits_model(), tmp_path / "m.onnx", images, progress=False, batch=2, least_agreement=0)
    assert (report.calibrated, report.judged, report.held_out) == (5, 5, False)
    assert fx.inspect(report.path).inputs[0].shape == (2, 3, 32, 32)


def test_disagreement_is_refused(tmp_path: Path) -> None:
    """Two classes that 256 levels cannot distinguish: in int8 their weights are equal, and the first class wins.

    In float32 the second is ahead in all channels but one, by less than half a level, and the channels are never
    negative.
    """
    model = digits_model()
    level = 1 / 127
    first = torch.full((model.fc.weight.shape[1],), 64 * level)
    first[0] = 1  # the value that sets the scale of the levels
    second = (first + 0.4 * level).clamp(max=1)
    model.fc.weight.data.copy_(torch.stack([first, second] + 8 * [-first]))
    model.fc.bias.data.zero_()
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(CalibrationError, match=r"same best class as float32 for 0\.0% of 6 images"):
        export_int8(model, path, training_images(24), progress=False)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_bad_calibration_is_named(tmp_path: Path) -> None:
    for folder in ("empty", "texts", "damaged"):
        (tmp_path / folder).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "damaged" / "a.png").write_bytes(b"no image")
    cases: list[tuple[Any, dict[str, Any], type[FastresError], str]] = [
        (tmp_path / "empty", {}, CalibrationError, "has no files"),
        (tmp_path / "texts", {}, CalibrationError, "1 files, none of them an image"),
        (tmp_path / "nowhere", {}, CalibrationError, "does not exist"),
        (tmp_path / "texts" / "a.txt", {}, CalibrationError, "is a file"),
        (tmp_path / "damaged", {}, ImageError, "a.png"),
        ([], {}, CalibrationError, "No calibration images"),
        (training_images(1), {"least_agreement": 2}, InputError, "least_agreement"),
        (training_images(1), {"image_size": 64}, InputError, "cropped to 32"),
    ]
    (tmp_path / "out").mkdir()
    for images, options, kind, says in cases:
        with pytest.raises(kind, match=says):
            export_int8(digits_model(), tmp_path / "out" / "m.onnx", images, progress=False, **options)
    with pytest.raises(ExportFileError):
        export_int8(digits_model(), tmp_path / "no" / "m.onnx", training_images(1), progress=False)
    assert os.listdir(tmp_path / "out") == []
