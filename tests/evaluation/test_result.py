"""The result as text: nothing is missing that the report says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastres

from .running import DIGITS, evaluate


def copied(few: Path, folder: Path, digits: str, each: int = 4) -> Path:
    for digit in digits:
        (folder / digit).mkdir(parents=True)
        for path in sorted((few / digit).iterdir())[:each]:
            shutil.copy(path, folder / digit)
    return folder


def test_one_image(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is not symmetric."""
    monkeypatch.setenv("COLUMNS", "200")
    lines = str(evaluate(copied(few, tmp_path / "one", "4", 1))).splitlines()
    assert lines[0] == "1 image"
    assert lines[2] == "9 of 10 classes have no images: 0, 1, 2, 3, 5 and 4 others"
    assert "20.65–100%" in lines[-1]


def test_a_class_without_readable_images_is_missing(few: Path, tmp_path: Path) -> None:
    folder = copied(few, tmp_path / "digits", "012345678")
    (folder / "9").mkdir()
    (folder / "9" / "broken.png").write_bytes(b"")
    result = evaluate(folder)
    assert result.labels is not None
    assert result.labels.missing == (9,)
    assert "1 of 10 classes has no images that could be read: 9" in str(result)


def test_no_answers_are_said(few: Path) -> None:
    model = fastres.load(DIGITS)
    with torch.no_grad():
        model.fc.bias[3] = torch.nan
    assert "no answer: broken gives NaN for 40 images, which count as wrong" in str(evaluate(few, {"broken": model}))


def test_a_wrong_order_is_doubted(few: Path, tmp_path: Path) -> None:
    labels = {path.name: (int(path.parent.name) + 1) % 10 for path in few.rglob("*.png")}
    assert "doubt: The labels may be in another order than the model's classes" in str(evaluate(few, labels=labels))
    assert "doubt" not in str(evaluate(few))


def test_certainty_has_no_sign(few: Path, tmp_path: Path) -> None:
    """A network with one class is always right."""
    tensors: dict[str, Any] = dict(fastres.load(DIGITS).state_dict())
    tensors["fc.weight"], tensors["fc.bias"] = tensors["fc.weight"][:1], tensors["fc.bias"][:1]
    model = fastres.load(DIGITS, tensors, num_classes=1)
    accuracy = evaluate(copied(few, tmp_path / "zero", "0"), model).models[0].accuracy
    assert accuracy is not None
    assert str(accuracy.nll) == "0.0"
