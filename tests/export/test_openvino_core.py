"""One OpenVINO core for the process, because two that are deleted leave a signal stack that is gone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

openvino = pytest.importorskip("openvino")
ROOT = Path(__file__).parents[2]

ENGINES_IN_TURN = """
import os, signal, torch, fastres
from fastres.evaluation.engines import open_engine
from fastres.export.engines import openvino_engine

model, pixels = fastres.load("resnet20_digits"), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
opened = [open_engine(model, "openvino", batch_size=2, most=5) for _ in range(2)]
opened.append(openvino_engine(model, pixels.float()))
opened[0].run(pixels)
while opened:
    del opened[0]
seen = []
signal.signal(signal.SIGCHLD, lambda *_: seen.append(1))
if os.fork() == 0:
    os._exit(0)
os.wait()
print("handled", len(seen))
"""


def test_a_signal_after_engines_were_deleted_in_order() -> None:
    """The end of a child process, which has a handler in every program with worker processes, ended the process."""
    done = subprocess.run(
        [sys.executable, "-c", ENGINES_IN_TURN], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["handled", "1"]), done.stderr[-2000:]


def test_nothing_else_makes_a_core() -> None:
    made = {
        path.relative_to(ROOT).as_posix()
        for folder in ("fastres", "export", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bCore\(\)", path.read_text(encoding="utf-8")) and path != Path(__file__)
    }
    assert {name for name in made if not name.startswith("fastres/export")} == {"export/openvino_core.py"}
