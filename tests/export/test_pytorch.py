"""``.pt2`` files: their results, and that torch loads them without fastres."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres.errors import InputError

pytest.importorskip("onnx")

from fastres.export import pytorch
from fastres.export.errors import ExportFileError, VerificationError
from fastres.export.pytorch import export_torch
from tests.measures import relative_error

from .networks import digits_model, every_step_model, network

ALONE = """
import sys
sys.modules["fastres"] = None
import json, torch
extra = {"metadata.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
x = torch.load(sys.argv[2])
torch.save(program(x), sys.argv[3])
print(json.loads(extra["metadata.json"])["weights"])
"""


def test_loads_and_runs_without_fastres(tmp_path: Path) -> None:
    model = digits_model()
    report = export_torch(model, tmp_path / "digits.pt2", image_size="dynamic", progress=False)
    assert [check.batch for check in report.checks] == [1, 2, 5]
    x = torch.randn(3, 3, 21, 34)
    torch.save(x, tmp_path / "x.pt")
    paths = [str(tmp_path / name) for name in ("digits.pt2", "x.pt", "y.pt")]
    done = subprocess.run([sys.executable, "-c", ALONE, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "DIGITS_V1"
    assert relative_error(torch.load(tmp_path / "y.pt"), model(x)) < 1e-5


def test_imagenet_stem_and_metadata(tmp_path: Path) -> None:
    known = network("plain18")
    path = tmp_path / "plain.pt2"
    export_torch(known.model, path, image_size="dynamic", progress=False)
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    known.check(program)
    metadata = json.loads(extra["metadata.json"])
    assert (metadata["model"], metadata["dtype"], metadata["crop"]) == ("plain18", "float32", "224")


def test_every_kind_of_step(tmp_path: Path) -> None:
    model = every_step_model()
    export_torch(model, tmp_path / "m.pt2", image_size="dynamic", progress=False)
    program = torch.export.load(tmp_path / "m.pt2").module()
    for size in ((64, 64), (45, 71)):
        x = torch.randn(2, 3, *size)
        assert relative_error(program(x), model(x)) < 1e-5


def test_float16_and_fixed_shapes(tmp_path: Path) -> None:
    model = digits_model()
    report = export_torch(model, tmp_path / "m.pt2", dtype="float16", batch=2, image_size=(24, 40), progress=False)
    assert [(c.batch, c.height, c.width) for c in report.checks] == [(2, 24, 40)]
    program = torch.export.load(report.path).module()
    x = torch.randn(2, 3, 24, 40)
    logits = program(x.half())
    assert logits.dtype == torch.float32
    assert relative_error(logits, model(x)) < 1e-2


def test_failures_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="at least 8"):
        export_torch(digits_model(), tmp_path / "m.pt2", image_size=4, progress=False)
    with pytest.raises(ExportFileError, match="does not exist"):
        export_torch("resnet20_digits", tmp_path / "no" / "m.pt2", progress=False)
    monkeypatch.setitem(pytorch.TOLERANCE, torch.float32, 1e-12)
    with pytest.raises(VerificationError, match="give different results"):
        export_torch(digits_model(), tmp_path / "m.pt2", progress=False)
    assert os.listdir(tmp_path) == []
