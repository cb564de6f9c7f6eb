"""fastres.classify, interrupted: finished rows are kept, and a resumed run gives the same rows."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import fastres
from fastres.classification import batches, job
from fastres.commands.cli import main
from fastres.errors import OutputError, ResumeError, WorkerError

from .conftest import classify, encoded, failed


def interrupt(monkeypatch: pytest.MonkeyPatch, error: BaseException, batch: int = 3) -> None:
    """Raise ``error`` instead of returning the results of a batch."""
    original, calls = job.classified, []

    def outputs(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == batch:
            raise error
        return original(*given)

    monkeypatch.setattr(job, "classified", outputs)


@pytest.fixture
def interrupted(folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interrupted output with 10 rows kept."""
    output = tmp_path / "out.parquet"
    interrupt(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=r"10 of 24 rows"):
        classify(folder, output, model)
    monkeypatch.undo()
    return output


def test_two_thousand_images_killed_half_way(
    digits: list[Image.Image], photos: list[Image.Image], model: fastres.Model, tmp_path: Path
) -> None:
    """A run that is killed and then resumed gives the same rows as an undisturbed run."""
    place = tmp_path / "images"
    place.mkdir()
    variants = [photo.resize((300, 200 + 9 * i)) for i, photo in enumerate(photos * 5)]
    for index in range(2000):
        image = digits[index].resize((32, 32)) if index < 1797 else variants[index % 10]
        data = encoded(image, quality=90)
        (place / f"{index:04}.jpg").write_bytes(data[: len(data) // 2] if index % 100 == 50 else data)
    script = (
        "import fastres, fastres.classification.parts as parts, sys; parts.PART_ROWS = 100\n"
        "fastres.classify(sys.argv[1], sys.argv[2], model='resnet20_digits', device='cpu', batch_size=20)"
    )
    killed, whole = tmp_path / "killed.parquet", tmp_path / "whole.parquet"
    process = subprocess.Popen([sys.executable, "-c", script, place, killed])
    folder = tmp_path / "killed.parquet.partial"
    while not list(folder.glob("rows-*-000000001000.parquet")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(OutputError, match=r"1,\d00 rows of an interrupted run"):
        classify(place, killed, model)
    report = classify(place, killed, model, resume=True, batch_size=20)
    assert report.resumed >= 1000
    assert (report.rows, report.errors) == (2000, 20)
    classify(place, whole, model, batch_size=20, workers=2)
    resumed, expected = pq.read_table(killed), pq.read_table(whole)
    assert resumed.drop_columns([f"score_{i}" for i in range(1, 6)]) == expected.drop_columns(
        [f"score_{i}" for i in range(1, 6)]
    )
    assert failed(expected) == [f"{index:04}.jpg" for index in range(50, 2000, 100)]
    assert not folder.exists()


def test_control_c(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = (
        "import os, signal, sys, fastres.classification.job as job, fastres.commands.cli as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's parent may ignore SIGINT
        "original, calls = job.classified, []\n"
        "def outputs(*given):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.killpg(0, signal.SIGINT)\n"  # the whole group, as a terminal does
        "    return original(*given)\n"
        "job.classified = outputs\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    output = tmp_path / "out.csv"
    command = ["classify", str(folder), "-o", str(output), "--model", "resnet20_digits", "--batch-size", "5"]
    given = [sys.executable, "-c", script, *command, "--workers", "1", "--quiet", "--device", "cpu"]
    process = subprocess.run(given, capture_output=True, text=True, start_new_session=True)
    assert process.returncode == 130
    assert "10 of 24 rows are kept" in process.stderr
    assert "Traceback" not in process.stderr
    assert not output.exists()
    assert main([*command, "--resume", "--json", "--quiet", "--workers", "0"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["rows"], report["errors"], report["resumed"]) == (24, 3, 10)
    with output.open(newline="") as file:
        assert len({row["path"] for row in csv.DictReader(file)}) == 24


def test_resume_with_other_settings(interrupted: Path, folder: Path, model: fastres.Model) -> None:
    for options, message in [
        ({"top_k": 2}, "columns was"),
        ({"decoder": "exact"}, "decoder was 'fast' and is now 'exact'"),
        ({"embed": True}, "embedding"),
    ]:
        with pytest.raises(ResumeError, match=message):
            classify(folder, interrupted, model, resume=True, **options)
    other = fastres.load("resnet20_digits")
    with torch.no_grad():
        other.fc.bias[0] += 1
    with pytest.raises(ResumeError, match="weights_sha256"):
        classify(folder, interrupted, other, resume=True)
    assert classify(folder, interrupted, model, resume=True).resumed == 10  # and asking lost nothing


@pytest.mark.parametrize("change", ["added", "removed", "rewritten"])
def test_resume_with_other_images(interrupted: Path, folder: Path, model: fastres.Model, change: str) -> None:
    path = folder / "sub" / "x.jpg"
    if change == "added":
        (folder / "zz.jpg").write_bytes(b"")
    elif change == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes())
    with pytest.raises(ResumeError, match=r"had different images: .*(x|zz)\.jpg"):
        classify(folder, interrupted, model, resume=True)
    assert classify(folder, interrupted, model, overwrite=True).resumed == 0
    assert pq.read_table(interrupted).num_rows == len([*folder.rglob("[!.]*.jpg")])


def test_worker_that_dies(folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: Any) -> None:
    original = batches.decoder

    def deadly(name: str) -> Any:
        def decode(source: str, transforms: Any) -> torch.Tensor:
            if source.endswith("l.jpg"):
                os._exit(3)
            return original(name)(source, transforms)

        return decode

    monkeypatch.setattr(batches, "decoder", deadly)
    output = tmp_path / "out.parquet"
    with pytest.raises(WorkerError, match=r"of 24 rows are kept|no row was finished; run it again"):
        classify(folder, output, model, workers=1)
    monkeypatch.undo()
    report = classify(folder, output, model, resume=True)
    assert (report.rows, report.errors) == (24, 3)


def test_another_error_keeps_the_rows_too(
    folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        classify(folder, tmp_path / "out.parquet", model)
    monkeypatch.undo()
    assert classify(folder, tmp_path / "out.parquet", model, resume=True).resumed == 10
