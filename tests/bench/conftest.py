"""A fixture that makes benchmark runs small."""

from __future__ import annotations

import pytest

from fastres.bench.measure import ceilings, checking, timing


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce a run to two rounds, small ceiling measurements and few images in the check of each engine."""
    monkeypatch.setattr(checking, "IMAGES_OF_SMALL_NETWORKS", checking.IMAGES)
    monkeypatch.setattr(timing, "QUICK", timing.Budget(0.0, 2, 2, 1))
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(ceilings, "_MATMUL_SIZE", {"cpu": 128})
    monkeypatch.setattr(ceilings, "_LEAST_SECONDS", 0.0)
