"""Classes of calibration images, from sequences, mappings, files and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastres
from fastres.calibration.labels import Labels
from fastres.errors import InputError

NAMES = ("photos/2/a.png", "photos/7/b.png")


def found(given: Any, model: fastres.Model) -> list[int]:
    labels = Labels(given, model)
    labels.check_names(NAMES)
    labels.check_count(len(NAMES))
    return [labels.of(name, position) for position, name in enumerate(NAMES)]


@pytest.mark.parametrize(
    "given",
    [
        [2, 7],
        ("2", "7"),
        np.array([2, 7]),
        torch.tensor([2, 7], device="cpu"),
        iter([2, 7]),
        {"photos/2/a.png": 2, "7/b.png": "7"},
        {"a.png": 2, "b.png": 7},
        "folders",
    ],
)
def test_labels_have_many_forms(given: Any, model: fastres.Model) -> None:
    assert found(given, model) == [2, 7]


@pytest.mark.parametrize(
    "text",
    ["a.png,2\nb.png,7\n", "path,label\na.png,2\nb.png,7\n", "a.png\t2\nb.png\t7\n", "2\n7\n", "[2, 7]",
     '{"a.png": 2, "b.png": "7"}'],
)  # fmt: skip
def test_labels_are_read_from_files(text: str, model: fastres.Model, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text)
    assert found(str(tmp_path / "labels"), model) == [2, 7]


def test_class_names_are_labels(model: fastres.Model) -> None:
    named = fastres.load("resnet20_digits", categories=[f"digit {index}" for index in range(10)])
    assert found(["digit 2", "digit 7"], named) == [2, 7]
    ten = fastres.load("resnet20_digits", categories=list("abcdefghij"))
    labels = Labels("folders", ten)
    labels.check_names([f"x/n{number:02}/a.jpg" for number in range(10)])
    assert labels.of("x/n04/a.jpg", 0) == 4  # in the order of the folders' names, as torchvision's ImageFolder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [2, 10],
            r"labels\[1\] is 10, which is no class of this resnet20_digits with 10 classes; give an index",
        ),
        ([2, -1], r"labels\[1\] is -1"),
        ([2, 1.5], r"labels\[1\] is 1.5"),
        ([2, "cat"], r"labels\[1\] is 'cat', .* or the name of a class"),
        ({"a.png": "cat"}, r"labels\['a.png'\] is 'cat'"),
        ({"a.png": 2}, r"no entry for 'photos/7/b.png'"),
        ([2], "There are 1 labels for 2 images"),
        (iter([2]), "There are only 1 labels"),
        (7, "labels is 7; give one label for each image"),
        ("nowhere.csv", r"'nowhere.csv' cannot be read \(No such file"),
    ],
)
def test_wrong_labels_are_named(given: Any, message: str, model: fastres.Model) -> None:
    with pytest.raises(InputError, match=message):
        found(given, model)


@pytest.mark.parametrize(("text", "message"), [("a,b,c\n", "lines with 3 columns"), ("[1, 2", "is not JSON")])
def test_wrong_files_are_named(text: str, message: str, model: fastres.Model, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(InputError, match=message):
        found(tmp_path / "labels", model)


def test_folders_that_are_no_classes_are_named(model: fastres.Model) -> None:
    with pytest.raises(InputError, match="A folder's name is 'cats', which is no class"):
        Labels("folders", model).check_names(["x/cats/a.jpg", "x/2/b.jpg"])


def test_a_network_without_classes_takes_no_labels() -> None:
    headless = fastres.load("resnet20", None, num_classes=0)
    with pytest.raises(InputError, match="no classifier"):
        Labels([1], headless)
