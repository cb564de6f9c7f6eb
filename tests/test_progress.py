"""The lines that ``make test`` prints while it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .progress import Progress

ROOT = Path(__file__).parents[1]


def test_a_line_says_what_has_run_and_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress()
    progress.total = 4
    for name in ("tests/a.py::x", "tests/b.py::y"):
        progress.pytest_runtest_logstart(name)
        now[0] += 30
    progress.pytest_runtest_logfinish("tests/b.py::y")
    now[0] += 5
    assert progress.line() == " 1:05  25 %  1 of 4 tests, 0 failed; now a.py::x (65 s)"


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "workers"])
def test_failures_are_named_and_all_tests_counted(workers: list[str], tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.progress", "-p", "no:cacheprovider", *workers]
    command += ["-o", "console_output_style=classic"]
    done = subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split("::")[1] for line in lines if line.startswith("FAILED") and "(call)" in line] == [
        "test_wrong (call)"
    ]
    assert any("100 %  2 of 2 tests, 1 failed" in line for line in lines)
    assert "1 failed, 1 passed" in lines[-1]
