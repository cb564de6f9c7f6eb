"""Benchmark runs that measure little."""

from __future__ import annotations

import pytest

from fastres.bench.measure import ceilings, checking, timing


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little: two rounds, small ceilings, few images to judge engines by."""
    monkeypatch.setattr(checking, "IMAGES_OF_SMALL_NETWORKS", checking.IMAGES)
    monkeypatch.setattr(timing, "QUICK", timing.Budget(0.0, 2, 2, 1))
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(ceilings, "_MATMUL_SIZE", {"cpu": 128})
