"""When graphs are captured, replayed and forgotten: the logic on plain tensors, the graphs themselves on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastres import graphs
from fastres.graphs import Captured, GraphExecutor


class Doubler:
    """Stands for the GPU executor; counts how often it runs."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, x: Tensor, outputs: Sequence[str] = ("logits",)) -> list[Tensor]:
        self.runs += 1
        return [x * 2 for _ in outputs]


class FakePool:
    """Captures by remembering what to compute; replays by computing it into the captured outputs."""

    def __init__(self) -> None:
        self.captures = 0
        self.capturing = False

    def capture(self, runner: Doubler, x: Tensor, outputs: Sequence[str]) -> Captured:
        self.captures += 1
        source = torch.zeros_like(x)
        results = [torch.zeros_like(x) for _ in outputs]

        class Graph:
            def replay(self) -> None:
                for result in results:
                    torch.mul(source, 2, out=result)

        return Captured(Graph(), source, results)

    def replay(self, captured: Captured, x: Tensor) -> list[Tensor]:
        return captured(x)

    def is_capturing(self) -> bool:
        return self.capturing


@pytest.fixture
def parts() -> tuple[Doubler, FakePool, GraphExecutor]:
    runner, pool = Doubler(), FakePool()
    return runner, pool, GraphExecutor(runner, pool, kept=2)


Parts = tuple[Doubler, FakePool, GraphExecutor]


def test_runs_captures_then_replays(parts: Parts) -> None:
    runner, pool, executor = parts
    counts = []
    for value in (1.0, 2.0, 3.0, 4.0):
        (y,) = executor.run(torch.full((2, 3), value))
        assert torch.equal(y, torch.full((2, 3), 2 * value))
        counts.append((runner.runs, pool.captures))
    assert counts == [(1, 0), (1, 1), (1, 1), (1, 1)]


def test_outputs_are_the_callers_own(parts: Parts) -> None:
    *_, executor = parts
    x = torch.ones(2, 3)
    results = [executor.run(x * value)[0] for value in range(1, 6)]
    assert [float(result[0, 0]) for result in results] == [2, 4, 6, 8, 10]


def test_shapes_dtypes_outputs_and_precision_are_kept_apart(parts: Parts) -> None:
    runner, pool, _ = parts
    executor = GraphExecutor(runner, pool, kept=16)
    inputs = [torch.ones(2, 3), torch.ones(3, 3), torch.ones(2, 3, dtype=torch.float16)]
    for _ in range(3):
        for x in inputs:
            executor.run(x)
        assert len(executor.run(inputs[0], ("logits", "pooled"))) == 2
    assert (runner.runs, pool.captures) == (4, 4)
    torch.set_float32_matmul_precision("high")
    try:
        executor.run(inputs[0])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert runner.runs == 5


def test_the_least_recently_used_is_forgotten(parts: Parts) -> None:
    runner, pool, executor = parts
    a, b, c = (torch.ones(size, 3) for size in (1, 2, 3))
    for x in (a, a, b, b, a, c, c):  # c pushes out b
        executor.run(x)
    assert pool.captures == 3
    executor.run(a)
    assert pool.captures == 3
    executor.run(b)
    assert runner.runs == 4
    assert len(executor._captured) == 2


def test_large_batches_and_callers_who_capture_get_plain_launches(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, pool, executor = parts
    monkeypatch.setattr(graphs, "LARGEST_INPUT", 100)
    for _ in range(3):
        executor.run(torch.ones(26))
    assert (runner.runs, pool.captures) == (3, 0)
    pool.capturing = True
    for _ in range(3):
        executor.run(torch.ones(5))
    assert (runner.runs, pool.captures) == (6, 0)
