"""Test the times by step: every step of the plan, in order, with its number of images. The executor stays unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastres
from fastres.bench.measure import layers
from fastres.errors import FastresError
from fastres.model.derived import make_executor
from fastres.model.explain import Explanation
from fastres.model.model import Model
from fastres.roofline.ceilings import Ceilings

CEILINGS = Ceilings(0.1, 20.0)


@pytest.fixture(scope="module")
def model() -> Model:
    return fastres.load("resnet20", None)


def test_every_step_has_a_time_and_its_place_under_the_roofline(model: Model) -> None:
    rows = layers.measure(model, torch.randn(2, 3, 32, 32), CEILINGS)
    explained = model.explain(2, 32, ceilings=CEILINGS)
    assert [row.step for row in rows] == [step.name for step in model.plan]
    for row, known in zip(rows, explained, strict=True):
        assert (row.model, row.size, row.batch, row.dtype) == ("resnet20", 32, 2, "float32")
        assert (row.kernel, row.flops, row.bytes, row.bound) == (known.kernel, known.flops, known.bytes, known.bound)
        assert row.us is not None
        assert row.us > 0
        assert row.roofline_us == pytest.approx(known.roofline_us, rel=1e-4)
        assert row.roofline_share == pytest.approx(row.roofline_us / row.us, rel=1e-3)


def test_marks_stand_around_steps_and_go_away(model: Model) -> None:
    executor: Any = make_executor(model.plan, model.device)
    x = torch.randn(1, 3, 32, 32)
    (expected,) = executor.run(x)
    clock = iter(float(tick) for tick in range(1000))
    stamps: list[layers.Stamp] = []
    with layers.stamped(executor, stamps, lambda: next(clock)):
        (found,) = executor.run(x)
    assert torch.equal(found, expected)
    assert [(begin, end) for *_, begin, end in stamps] == [(2 * i, 2 * i + 1) for i in range(22)]
    executor.run(x)
    assert len(stamps) == 22 == len(model.plan)


def test_calls_on_a_few_images_each_are_summed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{"stem": ([2, 2, 1], us), "head": ([5], 10.0)} for us in (300.0, 100.0, 200.0)]
    monkeypatch.setattr(layers, "step_times", lambda model, x: runs)
    stem, head = layers.measure(model, torch.zeros(5, 3, 32, 32), CEILINGS)
    whole = {row.step: row for row in model.explain(5, 32, ceilings=CEILINGS)}
    assert stem.us == 200.0
    assert stem.flops == whole["stem"].flops
    assert stem.bytes > whole["stem"].bytes  # weights are read three times
    assert (head.us, head.bytes) == (10.0, whole["head"].bytes)
    assert stem.batch == 5


def test_a_step_that_is_not_explained_is_named(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "step_times", lambda model, x: [{"layer9": ([4], 1.0)}])
    assert isinstance(model.explain(4, 32), Explanation)
    with pytest.raises(FastresError, match="layer9 ran on 4 images"):
        layers.measure(model, torch.zeros(4, 3, 32, 32), CEILINGS)


@pytest.mark.gpu
def test_steps_are_timed_by_events() -> None:
    on_gpu = fastres.load("resnet18", None, device="cuda")
    rows = layers.measure(on_gpu, torch.randn(4, 3, 64, 64, device="cuda", dtype=on_gpu.dtype), Ceilings(500, 2000))
    assert sum(row.us or 0.0 for row in rows) < 30_000  # none includes the spin of 50 ms
    assert all(row.us for row in rows)
