"""The images of the studies: the digits, and CIFAR-10 from a folder in its published format."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastres.bench.study.data import CIFAR_FOLDER, CIFAR_TEST, load_dataset
from fastres.errors import DatasetError
from tests.cifar10 import PER_BATCH, batch, write_cifar10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_cifar10(tmp_path)


def test_cifar10_is_read_in_order(folder: Path) -> None:
    data = load_dataset(folder)
    assert data.train_images.shape == (5 * PER_BATCH, 3, 32, 32)
    assert data.test_images.shape == (PER_BATCH, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8
    second = batch(1)
    image = second[b"data"][2]  # 1,024 red values, row by row, then green, then blue
    assert data.train_images[PER_BATCH + 2, 1, 3, 7] == image[1024 + 3 * 32 + 7]
    assert data.train_labels[PER_BATCH : 2 * PER_BATCH].tolist() == second[b"labels"]
    assert data.test_labels.tolist() == batch(5)[b"labels"]
    assert data.mirror
    assert data.name == "CIFAR-10"


def test_normalised_training_pixels_have_mean_zero_and_variance_one(folder: Path) -> None:
    data = load_dataset(folder)
    pixels = data.normalise(data.train_images)
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)


def test_the_folder_above_is_accepted(folder: Path) -> None:
    assert torch.equal(load_dataset(folder.parent).train_images, load_dataset(folder).train_images)


def test_limit_keeps_the_first_images(folder: Path) -> None:
    whole, part = load_dataset(folder), load_dataset(folder, limit=3)
    assert torch.equal(part.train_images, whole.train_images[:3])
    assert (len(part.test_images), len(part.train_labels), len(part.test_labels)) == (3, 3, 3)
    assert part.mean == whole.mean


def test_digits_are_the_default_and_never_mirrored() -> None:
    data = load_dataset()
    assert (len(data.train_images), len(data.test_images), data.mirror) == (1437, 360, False)


def break_label(contents: dict[bytes, Any]) -> None:
    contents[b"labels"][0] = 10


def drop_label(contents: dict[bytes, Any]) -> None:
    contents[b"labels"].pop()


def narrow(contents: dict[bytes, Any]) -> None:
    contents[b"data"] = contents[b"data"][:, :-1]


def make_float(contents: dict[bytes, Any]) -> None:
    contents[b"data"] = contents[b"data"].astype(np.float32)


def make_cifar100(contents: dict[bytes, Any]) -> None:
    contents[b"fine_labels"] = contents.pop(b"labels")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_label, "labels are not 4 whole numbers from 0 to 9"),
        (drop_label, "labels are not 4 whole numbers"),
        (narrow, r"uint8 \[4, 3071\]; CIFAR-10 has uint8 \[N, 3072\]"),
        (make_float, r"data is float32 \[4, 3072\]"),
        (make_cifar100, "labels are not"),
    ],
)
def test_other_contents_are_refused(folder: Path, change: Any, message: str) -> None:
    contents = batch(2)
    change(contents)
    (folder / "data_batch_3").write_bytes(pickle.dumps(contents, protocol=2))
    with pytest.raises(DatasetError, match=f"data_batch_3: .*{message}"):
        load_dataset(folder)


def test_a_missing_batch_is_named(folder: Path) -> None:
    (folder / CIFAR_TEST).unlink()
    with pytest.raises(DatasetError, match="test_batch is missing"):
        load_dataset(folder)


def test_a_truncated_batch_is_named(folder: Path) -> None:
    path = folder / "data_batch_5"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DatasetError, match="data_batch_5 is not a CIFAR-10 batch"):
        load_dataset(folder)


def test_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"nowhere is not a folder; give the unpacked {CIFAR_FOLDER}"):
        load_dataset(tmp_path / "nowhere")


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, ("run-by-a-pickle", 0o700)


def test_a_pickle_that_runs_code_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "data_batch_1").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(DatasetError, match="which an array does not need"):
        load_dataset(folder)
    assert not (folder / "run-by-a-pickle").exists()
