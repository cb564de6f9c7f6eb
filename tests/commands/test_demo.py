"""``fastres demo``: its report matches the model's results, and failures are visible."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import fastres
from fastres.bench.digits import training
from fastres.bench.digits.data import load_digits, split
from fastres.commands import demo
from fastres.errors import FastresError, MissingDependencyError
from fastres.look import pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reading() -> demo.Reading:
    return demo.read_digits(fastres.load("resnet20_digits"))[0]


def pixels(path: Path) -> NDArray[np.int64]:
    """Return the RGB pixels ``[H, W, 3]`` of a written picture."""
    return np.asarray(Image.open(path).convert("RGB")).astype(np.int64)


def red(picture: NDArray[np.int64]) -> int:
    """Return the number of clearly red pixels."""
    return int(((picture[..., 0] > 200) & (picture[..., 1] < 80) & (picture[..., 2] < 80)).sum())


def test_demo_reports_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A small network at a small size replaces ResNet-50.
    monkeypatch.setattr(demo, "compare_speed", functools.partial(demo.compare_speed, name="resnet20", size=32))
    path = tmp_path / "digits.png"
    report = demo.run(path, quick=True)
    assert report.images == 360
    assert report.correct + len(report.wrong) == report.images
    assert report.accuracy >= 0.98
    assert all(digit != read for digit, read in report.wrong)
    assert 0 < report.max_relative_error <= demo.TOLERANCE[getattr(torch, report.dtype)]
    assert [speed.batch for speed in report.speeds] == [1, 8]
    assert all(speed.fastres_ms > 0 and speed.eager_ms > 0 for speed in report.speeds)
    assert report.picture == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits.png"]
    text = capsys.readouterr().out
    for part in (f"{report.correct} correct", f"{report.accuracy:.2%}", "ResNet-50", "× as fast", str(path)):
        assert part in text


def test_picture_goes_to_the_working_directory_by_default(
    reading: demo.Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "read_digits", lambda model: (reading, 0.0))
    monkeypatch.setattr(demo, "compare_speed", lambda device, quick: (demo.Speed(1, 1.0, 1.0, 1.0),))
    monkeypatch.chdir(tmp_path)
    report = demo.run(quick=True)
    assert report.picture == Path("fastres_demo.png")
    assert (tmp_path / "fastres_demo.png").is_file()


def test_reading_on_the_cpu_has_the_recorded_accuracy(reading: demo.Reading) -> None:
    images, labels = load_digits()
    _, held_out = split(labels)
    assert torch.equal(reading.pixels, images[held_out])
    assert reading.digits == labels[held_out].tolist()
    assert 1 - len(reading.wrong) / len(reading.digits) == demo._record()["held_out_accuracy"]
    assert all(0.1 <= score <= 1 for score in reading.scores)


def test_accuracy_is_the_models_own() -> None:
    model = fastres.load("resnet20_digits")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for part in ("fc.weight", "fc.bias"):
        state[part] = state[part].roll(1, dims=0)  # every digit gets the name of the next one
    model.load_state_dict(state)
    spoiled, _ = demo.read_digits(model)
    assert len(spoiled.wrong) > 350


def test_logits_that_differ_from_eager_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    true_logits = training.logits

    def slightly_off(*arguments: object) -> Tensor:
        return true_logits(*arguments) * 1.001  # type: ignore[arg-type]

    monkeypatch.setattr(training, "logits", slightly_off)
    with pytest.raises(FastresError, match=r"logits of resnet20_digits in float32 differ .* by 0\.001"):
        demo.read_digits(fastres.load("resnet20_digits"))


def test_nan_logits_are_an_error() -> None:
    with pytest.raises(FastresError, match="differ"):
        demo._checked_error(torch.full((1, 10), float("nan")), torch.ones(1, 10), torch.float32, "resnet50")


def test_one_bad_image_in_a_batch_is_an_error() -> None:
    expected = torch.ones(360, 10)
    found = expected.clone()
    found[200, 3] = 1.1
    with pytest.raises(FastresError, match="differ"):
        demo._checked_error(found, expected, torch.float32, "resnet50")


def test_wrong_logits_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*arguments: object) -> float:
        raise AssertionError("timed before it was compared")

    monkeypatch.setattr(demo, "_milliseconds", timed)
    monkeypatch.setattr(demo, "TOLERANCE", {torch.float32: 0.0})
    with pytest.raises(FastresError, match="logits of resnet20"):
        demo.compare_speed(CPU, quick=True, name="resnet20", size=32)


def test_ratio_is_against_the_faster_eager_layout() -> None:
    assert demo.Speed(1, fastres_ms=2.0, eager_ms=8.0, eager_channels_last_ms=5.0).ratio == 2.5
    assert demo.Speed(1, fastres_ms=2.0, eager_ms=3.0, eager_channels_last_ms=5.0).ratio == 1.5


def test_picture_shows_digits_and_marks_wrong_ones_red(reading: demo.Reading, tmp_path: Path) -> None:
    demo.draw(reading, tmp_path / "all.png")
    right = demo.Reading(reading.pixels, reading.digits, reading.digits, reading.scores)
    demo.draw(right, tmp_path / "right.png")
    blank = demo.Reading(torch.zeros_like(reading.pixels), reading.digits, reading.digits, reading.scores)
    demo.draw(blank, tmp_path / "blank.png")
    ink = {name: float((pixels(tmp_path / f"{name}.png") < 128).mean()) for name in ("all", "right", "blank")}
    assert ink["all"] > ink["blank"] + 0.05
    assert ink["right"] > ink["blank"] + 0.05
    assert reading.wrong
    assert red(pixels(tmp_path / "all.png")) > 20
    assert red(pixels(tmp_path / "right.png")) == 0


@pytest.mark.parametrize("suffix", pictures.KINDS)
def test_every_kind_of_picture_is_written(reading: demo.Reading, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    demo.draw(reading, path)
    magic = {".png": b"\x89PNG", ".jpg": b"\xff\xd8\xff", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(magic)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("wrong", "cells"), [([], 40), ([3, 359], 40), (list(range(0, 360, 7)), 52)])
def test_all_misread_digits_are_drawn(wrong: list[int], cells: int) -> None:
    shown = demo.chosen_cells(360, wrong)
    assert len(shown) == len(set(shown)) == cells
    assert shown == sorted(shown)
    assert set(wrong) <= set(shown)
    assert all(0 <= index < 360 for index in shown)


def test_few_digits_are_all_drawn() -> None:
    assert demo.chosen_cells(7, [2]) == list(range(7))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("picture.txt", r"\.png, \.jpg"),
        ("picture", r"\.png, \.jpg"),
        ("folder.png", "folder"),
        ("no/p.png", "does not exist"),
    ],
)
def test_impossible_outputs_are_refused_before_any_work(
    output: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("it worked before it checked the output"))
    with pytest.raises(FastresError, match=said):
        demo.run(tmp_path / output)


def test_failed_write_is_named_and_leaves_nothing(
    reading: demo.Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FastresError, match=r"picture\.png.*Permission denied"):
        demo.draw(reading, tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_packages_are_named(module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}.*pip install .*\[demo\]'"):
        demo.run(tmp_path / "picture.png")


def test_importing_the_demo_imports_no_bench_and_no_extras() -> None:
    code = (
        "import sys, fastres.commands.demo; "
        "print([n for n in ('fastres.bench', 'sklearn', 'matplotlib', 'torchvision') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
