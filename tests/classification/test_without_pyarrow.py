"""CSV and JSON Lines without pyarrow: the same bytes, and a run goes on with it or without it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastres
from fastres.classification import parts

from .conftest import classify
from .test_interruption import interrupt

# Classifies sys.argv[1] without pyarrow; the batch sys.argv[3] raises KeyboardInterrupt.
PROGRAM = """
import sys
sys.modules["pyarrow"] = None
import fastres
from fastres.classification import job, parts
source, output, batch = sys.argv[1:]
parts.PART_ROWS, original, calls = 5, job.classified, []
def classified(*given):
    calls.append(given)
    if len(calls) == int(batch):
        raise KeyboardInterrupt
    return original(*given)
job.classified = classified
model = fastres.load("resnet20_digits")
print(fastres.classify(source, output, model=model, batch_size=5, workers=0, resume=True, progress=False).resumed)
"""


def without_pyarrow(source: Path, output: Path, interrupted_batch: int = 0) -> str:
    """Classify in a program that cannot import pyarrow; return how many rows were there, or the error."""
    given = [sys.executable, "-c", PROGRAM, str(source), str(output), str(interrupted_batch)]
    done = subprocess.run(given, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.splitlines()[-1]


@pytest.fixture(params=["folder", "tar"])
def source(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    if request.param == "folder":
        return folder
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, "images")
    return tmp_path / "images.tar"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_pyarrow_changes_no_byte_and_no_run(
    source: Path, suffix: str, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, first, second, third = (tmp_path / f"{name}{suffix}" for name in ("whole", "first", "second", "third"))
    report = classify(source, whole, model)
    assert (report.rows, report.errors) == (24, 3)
    assert without_pyarrow(source, first) == "0"
    assert first.read_bytes() == whole.read_bytes()

    assert "10 of 24 rows are kept" in without_pyarrow(source, second, interrupted_batch=3)
    assert classify(source, second, model, resume=True).resumed == 10
    assert second.read_bytes() == whole.read_bytes()

    monkeypatch.setattr(parts, "PART_ROWS", 5)
    interrupt(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="10 of 24 rows are kept"):
        classify(source, third, model)
    assert without_pyarrow(source, third) == "10"
    assert third.read_bytes() == whole.read_bytes()
