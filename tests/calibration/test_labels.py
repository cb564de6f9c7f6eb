"""Classes of calibration images: of a source, and of single images, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastres
from fastres.calibration.labels import Labels
from fastres.calibration.reading import read
from fastres.errors import InputError, LabelError
from fastres.images.classes import wordnet_ids
from fastres.terminal import progress_bar

NAMES = ("photos/2/a.png", "photos/7/b.png")


def streamed(given: Any, model: fastres.Model, order: str = "auto") -> list[int | None]:
    """Return the labels of single images, as of an iterable."""
    labels = Labels(given, model, order)
    found = [labels.of(name, position) for position, name in enumerate(NAMES)]
    labels.check_count(len(NAMES))
    return found


def of_source(given: Any, model: fastres.Model, source: Path, order: str = "auto") -> list[int]:
    """Return the labels of the images in a folder."""
    labels = Labels(given, model, order)
    found = read(source, model.transforms, labels, 100, 0, progress_bar(disable=True)).labels
    assert found is not None
    return found.tolist()  # type: ignore[no-any-return]


def unnamed(classes: int) -> fastres.Model:
    return fastres.load("resnet20", None, num_classes=classes)


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
    assert streamed(given, model) == [2, 7]


@pytest.mark.parametrize(
    "text",
    ["a.png,2\nb.png,7\n", "path,label\na.png,2\nb.png,7\n", "a.png\t2\nb.png\t7\n", "2\n7\n", "[2, 7]",
     '{"a.png": 2, "b.png": "7"}'],
)  # fmt: skip
def test_labels_are_read_from_files(text: str, model: fastres.Model, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text)
    assert streamed(str(tmp_path / "labels"), model) == [2, 7]


def test_the_labels_of_a_source(model: fastres.Model, folder: Path, digits: list[Any], tmp_path: Path) -> None:
    expected = sorted(label for _, label in digits)
    files = sorted(folder.rglob("*.png"))
    (tmp_path / "labels.csv").write_text(
        "other.png,3\n" + "".join(f"{file.name},{file.parent.name}\n" for file in files)
    )
    for given in (
        "folders",
        "auto",
        expected,
        {file.name: file.parent.name for file in files},
        tmp_path / "labels.csv",
    ):
        assert of_source(given, model, folder) == expected, given
    assert of_source(iter(expected), model, folder) == expected
    assert of_source(repeat(3), model, folder) == [3] * len(files)


def test_class_names_are_labels(model: fastres.Model) -> None:
    named = fastres.load("resnet20_digits", categories=[f"digit {index}" for index in range(10)])
    assert streamed(["digit 2", "Digit_7"], named) == [2, 7]
    assert streamed(iter(["digit 2", "Digit_7"]), named) == [2, 7]


def test_folders_mean_the_same_as_elsewhere(folder: Path, model: fastres.Model) -> None:
    ids = fastres.load("resnet20", None, num_classes=1000)
    for number in range(10):
        (folder / str(number)).rename(folder / wordnet_ids()[number * 7])
    assert set(of_source("folders", ids, folder)) == {number * 7 for number in range(10)}
    in_order = of_source("folders", unnamed(10), folder)  # as torchvision's ImageFolder
    assert in_order == sorted(in_order)
    assert set(in_order) == set(range(10))
    with pytest.raises(LabelError, match=r"10 folders do not fit .*this is no model for ImageNet-1k"):
        of_source("folders", unnamed(12), folder)
    assert of_source("folders", model, folder, "text") == in_order


def test_numbers_as_names_of_folders_need_a_choice(folder: Path) -> None:
    (folder / "2").rename(folder / "10")
    with pytest.raises(LabelError, match=r"'10' .* is class 10; .* Give labels_order='numbers', or categories="):
        of_source("folders", unnamed(11), folder)
    assert set(of_source("folders", unnamed(11), folder, "numbers")) == {0, 1, *range(3, 11)}
    with pytest.raises(LabelError, match="labels_order is 'best'; give 'auto', 'names'"):
        Labels("folders", unnamed(11), "best")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([2, 10], r"labels\[1\] is 10, which is no class of this model with 10 classes; give an index from 0 to 9"),
        ([2, -1], r"labels\[1\] is -1"),
        ([2, 1.5], r"labels\[1\] is 1.5"),
        ([2, "cat"], r"'cat' \(labels\[1\]\).* or names of classes"),
        (iter([2, "cat"]), r"'cat' \(labels\[1\]\).* or names of classes"),
        (iter([2, 10]), r"labels\[1\] is 10, which is no class"),
        ({"a.png": "cat"}, r"'cat' \(labels: the label of 'a.png'\)"),
        ({"a.png": 2}, r"no entry for 'photos/7/b.png'"),
        ([2], "There are only 1 labels"),
        ([2, 7, 1], "There are 3 labels for 2 images"),
        (iter([2]), "There are only 1 labels"),
        (7, "labels is 7; give one label for each image"),
        ("auto", "labels is 'auto', but images is no folder"),
        ("nowhere.csv", r"'nowhere.csv' cannot be read \(No such file"),
    ],
)
def test_wrong_labels_are_named(given: Any, message: str, model: fastres.Model) -> None:
    with pytest.raises(InputError, match=message):
        streamed(given, model)


def test_one_entry_for_two_images(model: fastres.Model) -> None:
    labels = Labels({"a.png": 2}, model)
    assert [labels.of("x/a.png", 0), labels.of("x/a.png", 1)] == [2, 2], "the same image twice"
    with pytest.raises(LabelError, match=r"the entry 'a.png', which means several images: 'x/a.png' and 'y/a.png'"):
        labels.of("y/a.png", 2)


@pytest.mark.parametrize(("text", "message"), [("a,b,c\n", "lines with 3 columns"), ("[1, 2", "is not JSON")])
def test_wrong_files_are_named(text: str, message: str, model: fastres.Model, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(InputError, match=message):
        Labels(tmp_path / "labels", model)


def test_folders_that_are_no_classes_are_named(model: fastres.Model, folder: Path) -> None:
    (folder / "2").rename(folder / "cats")
    with pytest.raises(LabelError, match=r"1 of 10 folders is not named as a class .*: 'cats' \(the folder of"):
        of_source("folders", model, folder)
    with pytest.raises(LabelError, match=r"'cats' \('x/cats/a.jpg'\)"):
        Labels("folders", model).of("x/cats/a.jpg", 0)


def test_labels_are_not_read_before_their_images(model: fastres.Model) -> None:
    read_so_far = []

    def stream() -> Iterator[int]:
        for number in range(3):
            read_so_far.append(number)
            yield number

    labels = Labels(stream(), model)
    assert [labels.of("x", position) for position in range(2)] == [0, 1]
    assert read_so_far == [0, 1]


def test_a_network_without_classes_takes_no_labels() -> None:
    headless = fastres.load("resnet20", None, num_classes=0)
    with pytest.raises(InputError, match="no classifier"):
        Labels([1], headless)
