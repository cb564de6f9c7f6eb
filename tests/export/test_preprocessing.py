"""Resize, crop and normalisation in the graph give the same results as the model's transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import fastres
from fastres.bench.measure.calibration import pixels, smooth_images
from fastres.images.transforms import Transforms

onnx = pytest.importorskip("onnx")

from fastres.export import onnx as fx  # noqa: E402
from fastres.export.builder import GraphBuilder  # noqa: E402
from fastres.export.preprocessing import add_preprocessing  # noqa: E402

from .networks import digits_model, run  # noqa: E402

PADDED = Transforms(resize=19, crop=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def graph(transforms: Transforms, opset: int = 18) -> onnxruntime.InferenceSession:
    """Return a session that only preprocesses."""
    model = onnx.ModelProto(ir_version=8)
    model.opset_import.append(onnx.helper.make_opsetid("", opset))
    model.graph.name = "preprocessing"
    builder = GraphBuilder(model)
    source = builder.input("input", torch.uint8, ("batch", "height", "width", 3))
    value = add_preprocessing(builder, source, transforms)
    builder.output(value, torch.float32, ("batch", 3, transforms.crop, transforms.crop))
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def pictures(count: int, height: int, width: int, kind: str) -> np.ndarray:
    if kind == "noise":
        return np.random.default_rng(height * width).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return pixels(smooth_images(count, height, width)).permute(0, 2, 3, 1).contiguous().numpy()


def levels(values: np.ndarray, transforms: Transforms) -> np.ndarray:
    """Convert normalised ``[N, 3, crop, crop]`` back to grey levels."""
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (transforms.mean, transforms.std))
    return (values * std + mean) * 255


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize(
    "transforms",
    [
        Transforms(256, 224),
        Transforms(232, 224),
        Transforms(32, 32),
        Transforms(33, 24),
        PADDED,
        Transforms(235, 224, interpolation="bicubic"),
        Transforms(41, 32, interpolation="bicubic", crop_rounding="down"),
    ],
    ids=["V1", "V2", "digits", "odd", "padded", "timm", "transformers"],
)
def test_equal_to_the_transforms(transforms: Transforms, kind: str) -> None:
    session = graph(transforms)
    # If the sizes have a simple ratio, some sums lie midway between two grey levels. Pillow rounds its weights to 22
    # bits, so these sums may round up or down.
    ties = {(8, 8), (20, 900), (33, 32), (256, 640)}
    for height, width in (*ties, (97, 131), (131, 97), (500, 375), (301, 302)):
        images = pictures(2, height, width, kind)
        (found,) = session.run(None, {"input": images})
        expected = torch.stack([transforms(Image.fromarray(image)) for image in images]).numpy()
        assert found.shape == expected.shape
        error = np.abs(levels(found, transforms) - levels(expected, transforms))
        # One grey level. The magnitudes of a cubic filter's weights add up to more than one, which ties of rows show.
        most = 2 if transforms.interpolation == "bicubic" and (height, width) in ties else 1
        assert error.max() < most + 0.01, (height, width)
        assert (error > 0.01).mean() < (0.05 if (height, width) in ties else 3e-3), (height, width)


def test_size_and_crop_follow_torchvisions_rounding() -> None:
    """Every row and column of the crop is the right one, tested with pixels that hold their own coordinates."""
    for crop in (8, 9, 12, 13):
        transforms = Transforms(resize=16, crop=crop, mean=(0, 0, 0), std=(1, 1, 1))
        session = graph(transforms)
        for height, width in ((16, 16), (16, 19), (21, 16), (16, 30), (37, 16)):
            rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
            image = np.stack([rows, columns, rows * 3 + columns], axis=-1).astype(np.uint8)
            (found,) = session.run(None, {"input": image[None]})
            expected = transforms.pixels(Image.fromarray(image)).numpy()
            assert np.array_equal(np.rint(found[0] * 255), expected), (crop, height, width)


@pytest.mark.parametrize("opset", [13, 22])
def test_every_opset_computes_the_same(opset: int) -> None:
    transforms = Transforms(33, 24)
    images = pictures(1, 61, 47, "noise")
    (found,), (expected,) = (graph(transforms, o).run(None, {"input": images}) for o in (opset, 18))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_photograph_gets_the_models_logits(dtype: str, tmp_path: Path) -> None:
    skimage = pytest.importorskip("skimage.data")
    model = digits_model()
    report = fx.export(model, tmp_path / "model.onnx", preprocessing=True, dtype=dtype, progress=False)
    assert report.input == ("batch", "height", "width", 3)
    image = skimage.astronaut()[37:300, 20:411]
    (logits,) = run(report.path, image[None])
    expected = model(model.transforms(Image.fromarray(image))[None])
    assert np.abs(logits - expected.numpy()).max() < {"float32": 2e-3, "float16": 3e-2}[dtype]
    assert fx.inspect(report.path).inputs[0].dtype == "uint8"


def test_metadata_says_that_the_graph_preprocesses(tmp_path: Path) -> None:
    for preprocessing in (True, False):
        fx.export("resnet20_digits", tmp_path / "m.onnx", preprocessing=preprocessing, verify=False, progress=False)
        strings = fx.inspect(tmp_path / "m.onnx").metadata
        assert strings["preprocessing"] == str(preprocessing).lower()
        assert fx.Metadata.from_strings(strings, "m").preprocessing is preprocessing
    assert fastres.__version__ == strings["fastres_version"]
