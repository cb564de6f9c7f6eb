"""The digits, their split, the training script and the bundled model."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import fastres
from fastres.bench.digits import training
from fastres.bench.digits.data import as_image, load_digits, load_scans, split, validation_split
from fastres.bench.digits.training import Recipe, Trained, augment, confusion_matrix, logits, train
from fastres.bench.engines.eager import EagerResNet
from fastres.bench.report.words import todays_command
from fastres.errors import FastresError, MissingDependencyError
from fastres.images.transforms import Transforms
from fastres.network.architectures import get_architecture, state_dict_shapes

DATA = Path(fastres.__file__).parent / "data"
WEIGHTS = DATA / "resnet20_digits.safetensors"
STILL = Recipe(degrees=0, zoom=0, shear=0, shift=0)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return load_digits()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((DATA / "resnet20_digits.json").read_text())


@pytest.fixture(scope="module")
def shipped(record: dict[str, Any]) -> Trained:
    """The committed weights in the plain PyTorch module."""
    module = EagerResNet(get_architecture("resnet20_digits"))
    module.load_state_dict(safetensors.torch.load_file(WEIGHTS))
    return Trained(module.eval(), tuple(record["mean"]), tuple(record["std"]), [record["final_train_loss"]])


def test_digits_are_grey_rgb_pixels(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    assert images.shape == (1797, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.shape == (1797,)
    assert labels.dtype == torch.int64
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    assert labels[:10].tolist() == list(range(10))


def test_scans_keep_all_grey_levels_apart() -> None:
    scans, _ = load_scans()
    assert len(np.unique(scans)) == 17
    assert (scans.min(), scans.max(), scans.dtype) == (0, 255, np.uint8)


def test_no_two_scans_are_equal() -> None:
    scans, _ = load_scans()
    assert len(np.unique(scans.reshape(len(scans), -1), axis=0)) == len(scans)


def test_training_pixels_are_what_predict_sees(digits: tuple[Tensor, Tensor], record: dict[str, Any]) -> None:
    images, _ = digits
    scans, _ = load_scans()
    transforms = Transforms(resize=record["resize"], crop=record["crop"])
    for scan, pixels in zip(scans, images, strict=True):
        image = as_image(scan)
        assert (image.mode, image.size) == ("L", (8, 8))
        assert torch.equal(transforms.pixels(image), pixels)


def test_split_is_fixed_balanced_and_disjoint(digits: tuple[Tensor, Tensor]) -> None:
    _, labels = digits
    torch.manual_seed(1)
    train_part, held_out = split(labels)
    torch.manual_seed(2)
    again, held_out_again = split(labels)
    assert torch.equal(train_part, again)
    assert torch.equal(held_out, held_out_again)
    assert (len(train_part), len(held_out)) == (1437, 360)
    assert sorted([*train_part.tolist(), *held_out.tolist()]) == list(range(1797))
    assert labels[held_out].bincount().tolist() == [36] * 10
    # The committed weights were trained on this split. Another split would test them on digits that they have seen.
    digest = hashlib.sha256(",".join(map(str, held_out.tolist())).encode()).hexdigest()
    assert digest.startswith("ad1d51bd6b77d289")


def test_validation_digits_come_from_the_training_part(digits: tuple[Tensor, Tensor]) -> None:
    _, labels = digits
    train_part, held_out = split(labels)
    part, validation = validation_split(labels)
    assert sorted([*part.tolist(), *validation.tolist()]) == train_part.tolist()
    assert labels[validation].bincount().tolist() == [28] * 10
    assert not set(validation.tolist()) & set(held_out.tolist())


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match=r"scikit-learn.*pip install .*\[demo\]'"):
        load_digits()


def test_record_names_the_committed_file(record: dict[str, Any]) -> None:
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == record["sha256"]
    assert (record["architecture"], record["entry"]) == ("resnet20_digits", "DIGITS_V1")
    assert record["classes"] == [str(digit) for digit in range(10)]
    assert record["recipe"]["epochs"] == record["epochs"]


def test_committed_state_dict_is_the_architectures() -> None:
    state = safetensors.torch.load_file(WEIGHTS)
    floats = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    assert floats == state_dict_shapes(get_architecture("resnet20_digits"))
    assert set(state) - set(floats) == {
        name.replace("running_mean", "num_batches_tracked") for name in floats if name.endswith("running_mean")
    }
    assert all(state[name].dtype == torch.float32 and state[name].isfinite().all() for name in floats)


def test_recorded_accuracy_is_the_files(
    digits: tuple[Tensor, Tensor], record: dict[str, Any], shipped: Trained
) -> None:
    images, labels = digits
    _, held_out = split(labels)
    predicted = logits(shipped.module, images[held_out], shipped.mean, shipped.std).argmax(1)
    accuracy = float((predicted == labels[held_out]).double().mean())
    assert accuracy == record["held_out_accuracy"]
    assert accuracy >= 0.98
    assert record["held_out_images"] == len(held_out)
    assert confusion_matrix(predicted, labels[held_out]) == record["confusion_matrix"]


def test_recorded_normalisation_is_of_the_training_pixels(
    digits: tuple[Tensor, Tensor], record: dict[str, Any]
) -> None:
    images, labels = digits
    pixels = images[split(labels)[0]].double() / 255
    assert record["mean"] == pytest.approx([float(pixels.mean())] * 3, abs=1e-4)
    assert record["std"] == pytest.approx([float(pixels.std())] * 3, abs=1e-4)


def test_confusion_matrix_has_a_row_for_each_true_digit() -> None:
    matrix = confusion_matrix(predicted=torch.tensor([3, 3, 9]), labels=torch.tensor([9, 3, 9]))
    assert matrix[9][3] == matrix[3][3] == matrix[9][9] == 1
    assert sum(map(sum, matrix)) == 3


def test_short_training_lowers_the_loss(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    losses = train(images[:128], labels[:128], Recipe(epochs=8, batch_size=32)).losses
    assert len(losses) == 32
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_same_seed_same_weights(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = (part[:64] for part in digits)
    recipe = Recipe(batch_size=16)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (train(images, labels, recipe, seed, steps=3) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)  # the caller's random state is untouched
    assert len(first.losses) == 3
    assert first.losses == second.losses
    states = [trained.module.state_dict() for trained in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])
    assert not first.module.training


def test_augmentation_keeps_still_images_still(digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0][:4].float() / 255
    assert torch.allclose(augment(images, STILL, torch.Generator().manual_seed(0)), images, atol=1e-5)


def test_augmentation_moves_each_image_its_own_way_and_never_mirrors() -> None:
    left = torch.zeros(64, 1, 32, 32)
    left[:, :, 12:20, 4:8] = 1  # a spot in the middle of the left edge
    moved = augment(left, Recipe(), torch.Generator().manual_seed(0))
    columns = (moved.sum(dim=(1, 2)) * torch.arange(32)).sum(1) / moved.sum(dim=(1, 2, 3))
    rows = (moved.sum(dim=(1, 3)) * torch.arange(32)).sum(1) / moved.sum(dim=(1, 2, 3))
    assert columns.max() < 15.5
    assert columns.std() > 0.5
    assert rows.std() > 0.5
    assert len(torch.unique(moved.flatten(1), dim=0)) == 64


@pytest.mark.parametrize("validate", [False, True], ids=["train", "validate"])
def test_command_never_trains_on_held_out_digits(
    digits: tuple[Tensor, Tensor],
    record: dict[str, Any],
    shipped: Trained,
    validate: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, labels = digits
    given: list[tuple[Tensor, Tensor]] = []

    def fake(images: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> Trained:
        given.append((images, labels))
        return shipped

    monkeypatch.setattr(training, "train", fake)
    training.main(["--out", str(tmp_path), *(["--validate"] if validate else [])])
    part = validation_split(labels)[0] if validate else split(labels)[0]
    assert torch.equal(given[0][0], images[part])
    assert torch.equal(given[0][1], labels[part])
    written = sorted(path.name for path in tmp_path.iterdir())
    if validate:
        assert written == []
        assert "on 280 digits" in capsys.readouterr().out
        return
    assert written == ["resnet20_digits.json", "resnet20_digits.safetensors"]
    new = json.loads((tmp_path / "resnet20_digits.json").read_text())
    changing = {"date", "seconds", "threads", "torch"}
    assert new.keys() == record.keys()
    assert todays_command(record["command"]) == new.pop("command")
    assert {key: new[key] for key in new.keys() - changing} == {key: record[key] for key in new.keys() - changing}
    assert (tmp_path / "resnet20_digits.safetensors").read_bytes() == WEIGHTS.read_bytes()


def test_failed_write_leaves_the_old_file(shipped: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resnet20_digits.safetensors").write_bytes(b"old")

    def fail(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FastresError, match="Permission denied"):
        training.save(shipped, {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["resnet20_digits.safetensors"]
    assert (tmp_path / "resnet20_digits.safetensors").read_bytes() == b"old"
