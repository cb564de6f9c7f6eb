"""Test a small run of the ``fastres classify`` benchmark: real photographs, both decoders, memory over time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from fastres.bench import classify


def test_the_folder_is_always_the_same_and_partly_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "SIZES", (((96, 96), 0.5), ((200, 150), 0.5)))
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        assert classify.make_folder(folder, 60) == 1
    assert [path.read_bytes() for path in sorted(folders[0].iterdir())] == [
        path.read_bytes() for path in sorted(folders[1].iterdir())
    ]
    assert sum(is_broken(path) for path in folders[0].iterdir()) == 1


def is_broken(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, UnidentifiedImageError):
        return True
    return False


def test_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(classify, "SIZES", (((96, 96), 1.0),))
    monkeypatch.setattr(classify, "COMPARED", ((160, 120),))
    given = ["--models", "resnet20_digits", "--images", "60", "--rounds", "1", "--workers", "1", "--device", "cpu"]
    assert classify.main([*given, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / classify.JSON_NAME).read_text())
    assert found["images"] == {"count": 60, "broken": 1}
    assert [run["decoder"] for run in found["runs"]] == ["exact", "fast"]
    assert all(run["images_per_s"][part] > 0 for run in found["runs"] for part in ("decode", "model", "whole"))
    exact, draft, fast = found["decoders"]
    assert exact["largest_pixel_difference"] == 0
    assert fast["largest_pixel_difference"] <= 1, "no scaled decoding at this size"
    assert draft["top_1_agreement"] <= 1
    assert all(sample["main_mb"] > 0 for sample in found["memory"]["resnet20_digits"]["samples"])
    assert "resnet20_digits" in capsys.readouterr().out


def test_memory_is_sampled_however_short_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    samples: list[dict[str, float]] = []
    with classify.sampled_memory(samples):
        pass
    assert len(samples) == 2
    assert samples[0]["main_mb"] > 0
