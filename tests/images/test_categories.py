"""Class names that users give, and the preprocessing of torchvision's weights."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

import fastres
from fastres.errors import InputError
from fastres.images import categories, presets
from fastres.model.loading import entry_transforms
from fastres.weights.published import entry_of_enum

NAMES = ("crane", "Zürich–Oerlikon", "crane")


@pytest.mark.parametrize(
    "given",
    [list(NAMES), NAMES, np.array(NAMES), dict(enumerate(NAMES)), {str(i): name for i, name in enumerate(NAMES)}],
    ids=["list", "tuple", "array", "numbers", "digits"],
)
def test_names_in_memory(given: Any) -> None:
    found = categories.parse(given, 3)
    assert found == NAMES
    assert all(type(name) is str for name in found)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "crane\nZürich–Oerlikon\ncrane\n"),
        ("names.txt", "\ufeffcrane \r\nZürich–Oerlikon\r\ncrane"),
        ("classes", "crane\nZürich–Oerlikon\ncrane\n"),
        ("names.json", json.dumps(NAMES)),
        ("names.JSON", json.dumps({"1": NAMES[1], "0": "crane", "2": "crane"})),
        ("index.json", json.dumps({"0": ["n1", "crane"], "1": ["n2", NAMES[1]], "2": ["n3", "crane"]})),
    ],
    ids=["text", "byte order mark", "no suffix", "list", "mapping", "ImageNet's index"],
)
def test_names_in_files(file: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_bytes(text.encode())
    assert categories.parse(path, 3) == categories.parse(str(path), 3) == NAMES


def test_the_index_of_a_data_set() -> None:
    assert categories.parse({"dog": 1, "cat": 0}, 2) == ("cat", "dog")


@pytest.mark.parametrize(
    ("given", "count", "message"),
    [
        (["cat"], 2, "categories has 1 name, but the model has 2 classes; give one name for each of the 2 classes"),
        (["cat", "dog"], 1, "categories has 2 names, but the model has 1 class; "),
        (["cat"], 0, r"the model has no classifier \(num_classes=0\); leave the names out"),
        ([], 2, "categories has 0 names, but the model has 2 classes"),
        ({}, 2, "categories has 0 names"),
        (["cat", 3], 2, "has 3 as the name of class 1; every class needs a name"),
        (["cat", ""], 2, "has '' as the name of class 1"),
        ({"0": []}, 1, r"has \[\] as the name of class 0"),
        ({"1": "cat", "2": "dog"}, 2, "indices are not 0 to 1, for example '2'"),
        ({"cat": 0, "dog": 2}, 2, "indices are not 0 to 1, for example '2'"),
        ({"cat", "dog"}, 2, "has the type set; give a list of names, or a file"),
        (3, 2, "has the type int"),
        (np.array(3), 2, "has the type int"),
    ],
)
def test_other_things_are_refused(given: Any, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        categories.parse(given, count)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "no.txt", r"no\.txt' cannot be read: No such file"),
        (b"{", "bad.json", r"bad\.json' does not hold class names \("),
        (b"\xff\xfe\x00", "bad.txt", r"bad\.txt' does not hold class names \("),
        (b'"cat"', "one.json", r"one\.json has the type str"),
        (b"cat\n\ndog\n", "gap.txt", r"gap\.txt has '' as the name of class 1"),
        (b"cat\n", "short.txt", r"short\.txt has 1 name, but the model has 2 classes"),
    ],
)
def test_other_files_are_refused(content: bytes | None, name: str, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        categories.parse(tmp_path / name, 2)
    with pytest.raises(InputError, match="cannot be read"):
        categories.parse(tmp_path, 2)


@pytest.mark.parametrize("weights", ["ResNet50_Weights.IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V2"])
def test_torchvisions_presets_are_those_of_the_published_weights(weights: str) -> None:
    member = torchvision.models.get_weight(weights)
    published = entry_transforms(entry_of_enum("resnet50", member, member.url))
    assert presets.parse(member.transforms()) == presets.parse(member.transforms) == published


def test_presets_with_other_numbers() -> None:
    preset = ImageClassification(
        crop_size=96, resize_size=100, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3),
        interpolation=InterpolationMode.BICUBIC,
    )  # fmt: skip
    expected = fastres.Transforms(100, 96, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "bicubic")
    assert presets.parse(preset) == expected
    assert presets.parse(expected) is expected
    preset.crop_size, preset.resize_size = [96, 96], 100  # type: ignore[assignment]
    assert presets.parse(preset) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ImageClassification(crop_size=[224, 200]), r"have crop_size=\[\[224, 200\]\]"),
        (ImageClassification(crop_size=224, resize_size=[256, 300]), r"have resize_size=\[\[256, 300\]\]"),
        (ImageClassification(crop_size=224, interpolation=InterpolationMode.NEAREST), "interpolate by 'nearest'"),
        (ImageClassification(crop_size=224, antialias=False), "without antialiasing"),
        (
            torchvision.transforms.Compose([]),
            "they are a Compose of nothing.*Give a fastres.Transforms, the transforms",
        ),
        (functools.partial(print), "transforms is a partial"),
        ("imagenet", "transforms is a str"),
    ],
)
def test_other_transforms_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        presets.parse(given)
