"""The studies' training: the schedule, the shifts, resuming, and running trained networks with fastres."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch

import fastres
from fastres.bench.study import training
from fastres.bench.study.data import Dataset, load_dataset
from fastres.bench.study.running import compare, run
from fastres.bench.study.training import Job, Recipe, Trained, augment, logits, read, train, train_all
from fastres.errors import FastresError
from tests.cifar10 import write_cifar10

JOB = Job("resnet20", seed=3, recipe=Recipe(epochs=3, batch_size=8), limit=24)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(limit=24)


@pytest.fixture(scope="module")
def trained(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return train(JOB, digits, folder), folder


def same_state(left: Trained, right: Trained) -> bool:
    return left.state.keys() == right.state.keys() and all(
        torch.equal(left.state[name], right.state[name]) for name in left.state
    )


def test_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    recipe = Recipe(epochs=10)
    assert recipe.rate(0.0) == 0.0
    assert recipe.rate(recipe.warmup / 2) == pytest.approx(recipe.learning_rate / 2)
    assert recipe.rate(recipe.warmup) == pytest.approx(recipe.learning_rate)
    assert recipe.rate((1 + recipe.warmup) / 2) == pytest.approx(recipe.learning_rate / 2)
    assert recipe.rate(1.0) == pytest.approx(0.0, abs=1e-12)


def test_augmentation_moves_each_image_by_at_most_the_shift() -> None:
    images = torch.arange(1, 1 + 9 * 11, dtype=torch.uint8).view(1, 1, 9, 11).repeat(200, 2, 1, 1)
    moved = augment(images, 2, False, torch.Generator().manual_seed(0))
    assert moved.dtype == torch.uint8
    padded = torch.nn.functional.pad(images[0], (2, 2, 2, 2))
    windows = {(top, left): padded[:, top : top + 9, left : left + 11] for top in range(5) for left in range(5)}
    seen = {place for image in moved for place, window in windows.items() if torch.equal(image, window)}
    assert all(any(torch.equal(image, window) for window in windows.values()) for image in moved)
    assert seen == set(windows)


def test_augmentation_mirrors_half_of_the_images_where_told() -> None:
    images = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4).repeat(400, 1, 1, 1)
    moved = augment(images, 0, True, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(image, images[0].flip(2)) for image in moved]
    kept = [torch.equal(image, images[0]) for image in moved]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 160 < sum(mirrored) < 240


def test_training_lowers_the_loss_and_counts_errors_as_fractions(trained: tuple[Trained, Path]) -> None:
    epochs = trained[0].epochs
    assert len(epochs) == 3
    assert epochs[-1].train_loss < epochs[0].train_loss
    assert all(0 <= error <= 1 for epoch in epochs for error in (epoch.train_error, epoch.test_error))


def test_interrupted_training_goes_on_to_the_same_weights(
    trained: tuple[Trained, Path], digits: Dataset, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(JOB, digits, tmp_path, stop)
    assert [path.name for path in tmp_path.iterdir()] == [f"{JOB.key}.partial"]
    ticks: list[int] = []
    resumed = train(JOB, digits, tmp_path, lambda: ticks.append(1))
    assert len(ticks) == 3  # one of them for the epoch that was already done
    assert same_state(resumed, trained[0])
    assert resumed.epochs == trained[0].epochs
    assert [path.name for path in tmp_path.iterdir()] == [f"{JOB.key}.safetensors"]


def test_a_trained_network_is_read_and_not_trained_again(
    trained: tuple[Trained, Path], digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_train_epoch", lambda *_: pytest.fail("it was trained again"))
    again = train(JOB, digits, trained[1])
    assert same_state(again, trained[0])
    assert again.epochs == trained[0].epochs


@pytest.mark.parametrize(
    "other", [replace(JOB, recipe=replace(JOB.recipe, epochs=4)), replace(JOB, limit=25), replace(JOB, data="cifar")]
)
def test_other_settings_are_another_network(trained: tuple[Trained, Path], other: Job) -> None:
    assert read(other, trained[1]) is None


def test_the_file_says_which_architecture_it_is(trained: tuple[Trained, Path]) -> None:
    with safetensors.safe_open(trained[1] / f"{JOB.key}.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == "resnet20"
    job = json.loads(metadata["job"])
    assert (job["model"], job["seed"], job["recipe"]["epochs"]) == ("resnet20", 3, 3)


def test_fastres_gives_a_trained_networks_logits(trained: tuple[Trained, Path], digits: Dataset) -> None:
    images = digits.normalise(digits.test_images)
    expected = logits(trained[0].module(), images)
    with torch.inference_mode():
        from_file = fastres.load("resnet20", trained[1] / f"{JOB.key}.safetensors")(images)
    assert torch.allclose(run("resnet20", trained[0].state, images), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(from_file, expected, rtol=1e-4, atol=1e-5)


def test_compare_refuses_other_logits(
    trained: tuple[Trained, Path], digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = digits.normalise(digits.test_images), digits.test_labels
    found = compare("a network", "resnet20", trained[0].state, images, labels)
    assert found["fastres_error"] == found["pytorch_error"]
    assert 0 < found["fastres_distance"] < 1e-5
    monkeypatch.setattr("fastres.bench.study.running.run", lambda *_: logits(trained[0].module(), images) * 1.0001)
    with pytest.raises(FastresError, match=r"a network: the logits of fastres differ from float64 by"):
        compare("a network", "resnet20", trained[0].state, images, labels)


def test_cifar10_is_trained_on_from_its_folder(tmp_path: Path) -> None:
    job = Job("resnet20", seed=0, recipe=Recipe(epochs=1), data=str(write_cifar10(tmp_path)))
    (found,) = train_all([job], tmp_path, workers=1)
    assert found.job.key == "resnet20-cifar10-seed0"
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["resnet20-cifar10-seed0.safetensors"]
    assert len(found.epochs) == 1


def test_two_processes_train_what_one_does(trained: tuple[Trained, Path], tmp_path: Path) -> None:
    jobs = [JOB, replace(JOB, model="plain20", recipe=replace(JOB.recipe, epochs=1))]
    found = train_all(jobs, tmp_path, workers=2)
    assert [network.job for network in found] == jobs
    assert same_state(found[0], trained[0])
