"""fastres.images.decoding: files that are not images, or have no known scale, raise an error with the reason."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastres.errors import FastresError, ImageError
from fastres.images.decoding import load_image


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=re.escape(f"{str(tmp_path / 'no.jpg')!r} does not exist;")):
        load_image(tmp_path / "no.jpg")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=re.escape(f"'no.jpg' does not exist in {tmp_path}")):
        load_image("no.jpg")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=re.escape(f"{str(tmp_path)!r} is a folder; pass a list of its files")):
        load_image(tmp_path)


@pytest.mark.parametrize("url", ["http://example.org/cat.jpg", "https://example.org/cat.jpg", "s3://cats/1.png"])
def test_urls(url: str) -> None:
    for source in (url, Path(url)):
        with pytest.raises(ImageError, match=r"is a URL.*download it first"):
            load_image(source)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "is empty"),
        ("a\0b.jpg", r"a\\x00b\.jpg' (does not exist|cannot be read)"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("/dev/null", "'/dev/null' is a device; pass the path of an image file"),
    ],
)
def test_odd_names(name: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        load_image(name)


@pytest.mark.parametrize("source", [None, 3, 2.5, {}, ["a.jpg"], object(), io.StringIO("text")])
def test_other_types(source: Any) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert isinstance(caught.value, FastresError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((), "rank 0"),
        ((9,), "rank 1"),
        ((2, 9, 9, 3), "is a batch"),
        ((1, 2, 9, 9, 3), "rank 5"),
        ((0, 9, 3), "no pixels"),
        ((9, 0), "no pixels"),
        ((9, 9, 5), "9, 5] and dtype uint8 has 5 channels; pass [H, W, C] with 1 to 4 channels."),
        ((3, 9, 8), "array.transpose(1, 2, 0)"),
    ],
)
def test_shapes_of_arrays(shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ImageError, match=re.escape(reason)):
        load_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((9,), "rank 1"),
        ((1, 3, 9, 9), "is a batch"),
        ((3, 0, 9), "no pixels"),
        ((9, 8, 3), "tensor.permute(2, 0, 1)"),
        ((5, 9, 9), "has 5 channels"),
    ],
)
def test_shapes_of_tensors(shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ImageError, match=re.escape(reason)):
        load_image(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint32", "bool", "complex64", "object", "U3"])
def test_dtypes_of_arrays(dtype: str) -> None:
    with pytest.raises(ImageError, match=r"unsupported dtype; use uint8.*astype\('uint8'\)") as caught:
        load_image(np.zeros((4, 4, 3), dtype))
    assert str(caught.value).endswith("* 255.") == (dtype == "bool")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_dtypes_of_tensors(dtype: torch.dtype) -> None:
    with pytest.raises(ImageError, match=r"unsupported dtype; use uint8.*tensor.to\(torch.uint8\)"):
        load_image(torch.zeros(3, 4, 4, dtype=dtype))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "NaN or infinite"),
        (float("inf"), "NaN or infinite"),
        (-2.1, "model(x)"),
        (200.0, "divide it by 255"),
        (1.01, "divide it by 255"),
        (40000.0, "largest possible value"),
    ],
)
def test_ranges_of_floats(value: float, reason: str) -> None:
    array = np.full((4, 4, 3), 0.5, np.float32)
    array[2, 1, 0] = value
    for source in (array, torch.from_numpy(array).permute(2, 0, 1)):
        with pytest.raises(ImageError, match=re.escape(reason)):
            load_image(source)


def test_tensors_that_are_not_plain_pixels() -> None:
    with pytest.raises(ImageError, match=r"detach\(\)"):
        load_image(torch.zeros(3, 4, 4, requires_grad=True))
    with pytest.raises(ImageError, match=r"to_dense\(\)"):
        load_image(torch.zeros(3, 4, 4).to_sparse())


def test_images_without_pixels() -> None:
    with pytest.raises(ImageError, match="no pixels"):
        load_image(Image.new("RGB", (0, 4)))
