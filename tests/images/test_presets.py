"""Preprocessing of other libraries does the same as theirs, or is refused; parts of it can be changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm.data
import torch
import torchvision.transforms as v1
from PIL import Image
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2
from transformers import ConvNextImageProcessor

import fastres
from fastres.errors import ConfigError, InputError
from fastres.images import presets
from fastres.images.transforms import Transforms

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PHOTO = Image.fromarray(np.random.default_rng(5).integers(0, 256, (90, 131, 3), dtype=np.uint8))


def composed(*middle: Any, resize: Any = 64, crop: Any = 48) -> v1.Compose:
    return v1.Compose([v1.Resize(resize), v1.CenterCrop(crop), *middle, v1.Normalize(MEAN, STD)])


# v2 multiplies by 1 / 255 where the others divide by 255.
@pytest.mark.parametrize(
    ("theirs", "rounding"),
    [
        (composed(v1.ToTensor()), 0),
        (composed(v1.PILToTensor(), v1.ConvertImageDtype(torch.float32), resize=[64], crop=(48, 48)), 0),
        (composed(v2.ToImage(), v2.ToDtype(torch.float32, scale=True)), 1e-6),
        (timm.data.create_transform((3, 48, 48), crop_pct=0.75, mean=MEAN, std=STD, interpolation="bicubic"), 0),
    ],
    ids=["ToTensor", "PILToTensor", "v2", "timm"],
)
def test_a_compose_is_translated(theirs: Any, rounding: float) -> None:
    own = presets.parse(theirs)
    torch.testing.assert_close(own(PHOTO), theirs(PHOTO).as_subclass(torch.Tensor), rtol=0, atol=rounding)
    assert (own.mean, own.std) == (MEAN, STD)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (composed(v1.ToTensor(), v1.ColorJitter()), "they are a Compose of Resize, CenterCrop, ToTensor, ColorJitter"),
        (v1.Compose([v1.Resize(64), v1.ToTensor(), v1.Normalize(MEAN, STD)]), "they are a Compose of Resize, ToTensor"),
        (composed(v1.ToTensor(), resize=(64, 80)), r"have Resize=\(64, 80\), but fastres resizes the shorter side"),
        (
            v1.Compose([v1.Resize((64, 64)), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
            r"squeeze images to a square \(Resize \(64, 64\)\).* as Resize\(64\) and CenterCrop\(64\) do",
        ),
        (v2.Compose([v2.ToImage(), v2.Resize(64), v2.CenterCrop(48)]), "begin with ToImage and resize tensors"),
        (composed(v2.ToDtype(torch.float32)), r"keep pixels in 0\.\.255 \(ToDtype\)"),
        (composed(v1.PILToTensor(), v1.ConvertImageDtype(torch.float16)), r"scales them to float32"),
        (v1.Compose([v1.Resize(64), v1.CenterCrop(48), v1.PILToTensor()]), r"keep pixels in 0\.\.255 \(PILToTensor\)"),
        (timm.data.create_transform(48, use_prefetcher=True), r"keep pixels in 0\.\.255 \(MaybePILToTensor\)"),
        (
            v1.Compose([v1.Resize(64, max_size=90), v1.CenterCrop(48), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
            "limit the longer side",
        ),
        (composed(), "they are a Compose of Resize, CenterCrop, Normalize"),
        (v1.ToTensor(), "transforms is a ToTensor; give a fastres.Transforms"),
    ],
)
def test_what_fastres_does_otherwise_is_refused(theirs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        presets.parse(theirs)


def test_a_compose_without_normalize_and_torchvisions_weights() -> None:
    theirs = v1.Compose([v1.Resize(64), v1.CenterCrop(48), v1.ToTensor()])
    assert torch.equal(presets.parse(theirs)(PHOTO), theirs(PHOTO))
    weights = ResNet50_Weights.IMAGENET1K_V2
    assert presets.parse(weights) == presets.parse(weights.transforms) == Transforms(232, 224)


def test_an_image_processor_of_transformers() -> None:
    processor = ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875, image_mean=MEAN, image_std=STD)
    model = fastres.load("resnet20", None, transforms=processor)
    assert model.transforms == Transforms(256, 224, MEAN, STD, "bicubic", "down")
    model.transforms = ConvNextImageProcessor(size={"shortest_edge": 192}, crop_pct=1.0)
    assert model.transforms.crop == 192
    with pytest.raises(ConfigError, match="The ConvNextImageProcessor"):
        fastres.load("resnet20", None, transforms=ConvNextImageProcessor(size={"shortest_edge": 384}))


def test_parts_of_the_preprocessing() -> None:
    base = Transforms(256, 224)
    assert presets.adjusted(base) == base
    assert presets.adjusted(base, 288) == Transforms(329, 288)
    assert presets.adjusted(Transforms(232, 224), (320, 320)) == Transforms(331, 320)
    changed = presets.adjusted(base, mean=np.float32([0.5, 0.4, 0.3]), std=torch.tensor([0.2, 0.25, 0.3]))
    assert changed == Transforms(256, 224, MEAN, STD)


def test_they_can_be_given_to_load_and_from_module() -> None:
    model = fastres.load("resnet20_digits", image_size=48, mean=MEAN)
    assert model.transforms == Transforms(48, 48, MEAN, fastres.load("resnet20_digits").transforms.std)
    other = fastres.load("resnet20", None, transforms=composed(v1.ToTensor()), std=(1, 1, 1))
    assert other.transforms == Transforms(64, 48, MEAN, (1, 1, 1))
    again = fastres.from_module(model, image_size=64)
    assert (again.transforms.crop, again.transforms.mean) == (64, MEAN)
    assert model.transforms.crop == 48


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": 0}, "image_size is 0; give a number of pixels"),
        ({"image_size": "large"}, "image_size is 'large'"),
        ({"image_size": (224, 192)}, r"image_size is \(224, 192\), but fastres crops a square"),
        ({"mean": 0.5}, r"mean is \(0\.5,\); pass three finite numbers"),
        ({"mean": "grey"}, "mean is 'grey'; give three numbers"),
        ({"std": (0.2, 0, 0.2)}, "std is .*; pass three finite numbers above 0"),
    ],
)
def test_parts_that_no_preprocessing_can_have(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fastres.load("resnet20_digits", **given)
