"""Complete visits on a pretend GPU, with injected faults: the archive is complete and correct each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_visits_come_home_whatever_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastres.bench.gpu", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "NO: " not in done.stdout
    scenes = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert len(scenes) == 6
    counts = done.stdout.rsplit("\n", 2)[-2].split()
    assert counts[0] == counts[2], "a check does not hold"
    assert int(counts[0]) >= 40
