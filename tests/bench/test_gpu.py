"""Test the command ``python -m bench.gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastres.bench import gpu
from fastres.bench.visit.pieces import VISITS


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_when_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--work", str(out)]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not out.exists()


def test_a_dry_count_needs_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in VISITS:
        assert gpu.main([name, "--dry", "--work", str(tmp_path)]) == 0
        assert "All pieces fit." in capsys.readouterr().out
    assert gpu.main(["first", "--dry", "--budget", "60", "--work", str(tmp_path)]) == 0
    assert "Not all pieces fit" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_unknown_pieces_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry", "--only", "nothing", "--work", str(tmp_path)]) == 2
    assert "first has no piece called 'nothing'" in capsys.readouterr().err
