"""Limits on the memory of an export, and the progress that a user sees."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")

EXPORT = """
import sys
from fastres.export import onnx
onnx.export("resnet50", sys.argv[1], weights=None)
# Not ru_maxrss: that counts what the process was forked from.
print(1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_resnet50_takes_less_than_1500_mb_and_shows_progress(tmp_path: Path) -> None:
    words = [sys.executable, "-c", EXPORT, str(tmp_path / "model.onnx")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5e9
    for step in ("load", "fold", "write", "check", "verify, batch 1", "verify, batch 2", "verify, batch 5", "exported"):
        assert re.search(rf"(?m)^{step} ", done.stderr), step
