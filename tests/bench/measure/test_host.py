"""Test that the host-time benchmark runs, and counts Python's work without waiting times."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fastres.bench.measure import host


def test_counts_calls_and_not_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "ROUNDS", 3)
    settled = []

    def settle() -> None:
        time.sleep(0.01)
        settled.append(True)

    calls = []
    found = host.microseconds(lambda: calls.append(1), settle, calls=1000)
    assert (len(settled), len(calls)) == (3, 3000)
    assert 0 < found < 10_000
    assert host.microseconds(lambda: time.sleep(0.001), lambda: None, calls=2) > 1000


def test_command_writes_its_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "ROUNDS", 2)
    assert host.main(["--model", "resnet18", "--out", str(tmp_path / "host.json")]) == 0
    found = json.loads((tmp_path / "host.json").read_text())
    assert found["model"] == "resnet18"
    assert found["host_us"] > 0
    assert "torch" in json.dumps(found["environment"])
