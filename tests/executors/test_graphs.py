"""When graphs are captured, replayed and dropped. The logic runs on plain tensors; real graphs are tested on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastres.errors import GraphMemoryWarning
from fastres.executors import graphs
from fastres.executors.graphs import GRAPHS_KEPT, Captured, GraphExecutor, images_run


class Doubler:
    """Replaces the GPU executor, and counts how often it runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.shapes: list[tuple[int, ...]] = []
        self.contiguous: list[bool] = []

    def run(self, x: Tensor, outputs: Sequence[str] = ("logits",)) -> list[Tensor]:
        self.runs += 1
        self.shapes.append(tuple(x.shape))
        self.contiguous.append(x.is_contiguous())
        return [x * 2 for _ in outputs]


class FakePool:
    """Captures by recording the computation, and replays by running it into the captured outputs."""

    def __init__(self) -> None:
        self.captures = 0
        self.capturing = False
        self.pixels = 1 << 40  # number of images for which there is memory

    def capture(self, runner: Doubler, shape: Sequence[int], dtype: torch.dtype, outputs: Sequence[str]) -> Captured:
        self.captures += 1
        if shape[2] * shape[3] > self.pixels:
            raise torch.OutOfMemoryError("no memory")
        source = torch.zeros(tuple(shape), dtype=dtype)
        results = [torch.zeros_like(source) for _ in outputs]

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


def images(n: int, value: float = 1.0, size: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((n, 3, size, size), value, dtype=dtype)


def test_runs_captures_then_replays(parts: Parts) -> None:
    runner, pool, executor = parts
    counts = []
    for value in (1.0, 2.0, 3.0, 4.0):
        (y,) = executor.run(images(2, value))
        assert torch.equal(y, images(2, 2 * value))
        counts.append((runner.runs, pool.captures))
    assert counts == [(1, 0), (1, 1), (1, 1), (1, 1)]


def test_outputs_are_the_callers_own(parts: Parts) -> None:
    *_, executor = parts
    results = [executor.run(images(2, value))[0] for value in range(1, 6)]
    assert [float(result[0, 0, 0, 0]) for result in results] == [2, 4, 6, 8, 10]


def test_shapes_dtypes_outputs_and_precision_are_kept_apart(parts: Parts) -> None:
    runner, pool, _ = parts
    executor = GraphExecutor(runner, pool, kept=16)
    inputs = [images(2), images(3), images(2, dtype=torch.float16)]
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


def test_sizes_share_graphs() -> None:
    assert [images_run(n) for n in range(1, 18)] == [*range(1, 17), 20]
    assert [images_run(n) for n in (20, 21, 24, 61, 64, 65, 66, 255)] == [20, 24, 24, 64, 64, 65, 66, 255]
    every = {images_run(n) for n in range(1, 65)}
    assert all(run >= n for n, run in ((n, images_run(n)) for n in range(1, 300)))
    assert len(every) == 28 < GRAPHS_KEPT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_rows_that_fill_up_stay_inside(parts: Parts, dtype: torch.dtype) -> None:
    runner, pool, executor = parts
    for n in (17, 19, 20, 18, 17):
        (y,) = executor.run(images(n, n, dtype=dtype))
        assert torch.equal(y, images(n, 2 * n, dtype=dtype))
        assert y.untyped_storage().nbytes() == y.nbytes  # memory of the caller's rows only
    assert (runner.runs, pool.captures) == (1, 1)
    assert runner.shapes == [(20, 3, 2, 2)]


def test_first_calls_run_what_graphs_run(parts: Parts) -> None:
    """A strided batch gets the graph's layout before the first call, so that all calls compute the same."""
    runner, _, executor = parts
    executor.run(images(4, size=4)[..., ::2])
    executor.run(images(3).to(memory_format=torch.channels_last))
    assert runner.contiguous == [True, True]


def test_the_least_recently_used_is_forgotten(parts: Parts) -> None:
    runner, pool, executor = parts
    a, b, c = (images(size) for size in (1, 2, 3))
    for x in (a, a, b, b, a, c, c):  # c pushes out b
        executor.run(x)
    assert pool.captures == 3
    executor.run(a)
    assert pool.captures == 3
    executor.run(b)
    assert runner.runs == 4
    assert len(executor._captured) == 2


def test_shapes_that_come_once_push_nothing_out(parts: Parts) -> None:
    runner, pool, executor = parts
    hot = images(1)
    for _ in range(2):
        executor.run(hot)
    for n in range(2, 40):
        executor.run(images(1, size=n + 1))
    runs = runner.runs
    executor.run(hot)
    assert (runner.runs, pool.captures) == (runs, 1)


def test_the_memory_of_inputs_is_bounded(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, pool, _ = parts
    executor = GraphExecutor(runner, pool, kept=16)
    monkeypatch.setattr(graphs, "PIXELS_KEPT", 10 * 4)
    for n in (5, 5, 4, 4, 3, 3):  # 12 images of 2×2: the first five are dropped
        executor.run(images(n))
    assert [key[0][0] for key in executor._captured] == [4, 3]


def test_without_memory_for_a_graph_calls_run_plainly(parts: Parts) -> None:
    _, pool, executor = parts
    pool.pixels = 10
    large = images(1, size=4)
    executor.run(large)
    with pytest.warns(GraphMemoryWarning, match=r"\[1, 3, 4, 4\]"):
        (y,) = executor.run(large)
    assert torch.equal(y, images(1, 2.0, size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            executor.run(large)
        for _ in range(2):
            executor.run(images(1, size=5))  # said once
    assert pool.captures == 2, "each shape is tried once"
    for _ in range(2):
        executor.run(images(1))
    assert pool.captures == 3, "shapes that fit are still captured"


def test_large_batches_and_callers_who_capture_get_plain_launches(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, pool, executor = parts
    monkeypatch.setattr(graphs, "LARGEST", 100)
    for dtype in (torch.uint8, torch.float32):  # pixels count, bytes do not
        for _ in range(3):
            executor.run(images(26, dtype=dtype))
    assert (runner.runs, pool.captures) == (6, 0)
    pool.capturing = True
    for _ in range(3):
        executor.run(images(5))
    assert (runner.runs, pool.captures) == (9, 0)


def test_the_limit_is_in_pixels() -> None:
    assert graphs.LARGEST == graphs.pixels((256, 3, 224, 224)) == graphs.pixels((64, 3, 448, 448))
