"""Test how ceilings are measured."""

from __future__ import annotations

import time

import pytest
import torch

from fastres.bench.measure import ceilings


def test_ceilings_are_the_best_try_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, small in (("_COPY_BYTES", 4096), ("_MATMUL_SIZE", 10), ("_REPEATS", 3)):
        monkeypatch.setattr(ceilings, table, {"cpu": small})
    monkeypatch.setattr(ceilings, "_LEAST_SECONDS", 0.0)
    calls: list[str] = []
    times = iter([4.0, 2.0, 8.0, 5.0, 10.0, 2.5])  # milliseconds: three products, three copies

    def elapsed(call: object, device: torch.device) -> float:
        calls.append("timed")
        call()  # type: ignore[operator]
        return next(times)

    monkeypatch.setattr(ceilings, "elapsed_ms", elapsed)
    found = ceilings.measure(torch.device("cpu"), torch.float32)
    assert found.tflops == pytest.approx(2 * 10**3 / 2e-3 / 1e12)
    assert found.gb_per_s == pytest.approx(2 * 4096 / 2.5e-3 / 1e9)  # each byte read and written
    assert len(calls) == 6


def test_short_products_are_repeated_until_a_disturbance_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.perf_counter()

    def elapsed(call: object, device: torch.device) -> float:
        return 9.0 if time.perf_counter() < begun + 0.1 else 3.0

    monkeypatch.setattr(ceilings, "elapsed_ms", elapsed)
    assert ceilings._best_seconds(lambda: None, torch.device("cpu"), 5) == 3e-3
