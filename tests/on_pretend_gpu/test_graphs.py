"""CUDA graphs on a pretend GPU: replays with every mode, layout, stream and lack of memory."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.bench.pretend_gpu.cuda import Pretence
from fastres.bench.pretend_gpu.streams import CaptureError
from fastres.errors import GraphMemoryWarning
from fastres.executors.graphs import GraphExecutor, Pool

pytestmark = pytest.mark.interpreter

CUDA = torch.device("cuda", 0)


@triton.jit
def double_kernel(y_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


class Doubler:
    """Replaces the executor: doubles a batch in its memory order, with a kernel specialised on its address."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.held: list[Tensor] = []

    def run(self, x: Tensor, outputs: Sequence[str] = ("logits",)) -> list[Tensor]:
        self.shapes.append(tuple(x.shape))
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        x, found = x if dense else x.contiguous(), []
        for _ in outputs:
            y = torch.empty_strided(x.shape, x.stride(), device=x.device, dtype=x.dtype)
            double_kernel[(triton.cdiv(x.numel(), 1024),)](y, x, x.numel(), BLOCK=1024)
            found.append(y)
        return found


def images(n: int, value: float = 1.0, size: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((n, 3, size, size), value, dtype=dtype, device=CUDA)


@pytest.fixture
def executor(pretence: Pretence) -> GraphExecutor:
    return GraphExecutor(Doubler(), Pool(CUDA))


def check(executor: GraphExecutor, x: Tensor) -> None:
    (y,) = executor.run(x)
    assert torch.equal(y, 2 * x)
    assert y.untyped_storage().nbytes() == y.nbytes, "memory for the caller, and no more"


def captures(pretence: Pretence) -> int:
    return pretence.timeline.log.count("capture_end")


def test_runs_captures_then_replays(pretence: Pretence, executor: GraphExecutor) -> None:
    found = []
    for value in range(4):
        check(executor, images(2, value))
        found.append((captures(pretence), pretence.timeline.log.count("replay")))
    assert found == [(0, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("modes", [(False, True, False), (True, False, True), (True, True, False), (True, True, True)])
def test_inference_mode_may_come_and_go(executor: GraphExecutor, modes: tuple[bool, ...]) -> None:
    results = []
    for turn, mode in enumerate(modes):
        with torch.inference_mode(mode):
            results.append(executor.run(images(2, turn))[0])
            assert results[-1].is_inference() == mode
    assert [float(y[0, 0, 0, 0]) for y in results] == [0.0, 2.0, 4.0]


LAYOUTS = {
    "contiguous": lambda: images(2),
    "channels last": lambda: images(2).to(memory_format=torch.channels_last),
    "strided": lambda: images(2, size=8)[..., ::2, ::2],
    "unaligned": lambda: torch.ones(2 * 48 + 1, device=CUDA)[1:].view(2, 3, 4, 4),
    "expanded": lambda: torch.ones(1, 1, 4, 4, device=CUDA).expand(2, 3, 4, 4),
}


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", ["contiguous", "unaligned"])
def test_layouts_may_change_between_calls(pretence: Pretence, executor: GraphExecutor, first: str, second: str) -> None:
    for name in (first, second, first, second):
        check(executor, LAYOUTS[name]())
    assert captures(pretence) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_sizes_of_a_bucket_share_a_graph(pretence: Pretence, executor: GraphExecutor, dtype: torch.dtype) -> None:
    for n in (18, 17, 20, 19, 17):
        check(executor, images(n, n, dtype=dtype))
    assert captures(pretence) == 1
    assert set(executor.runner.shapes) == {(20, 3, 4, 4)}  # type: ignore[attr-defined]


def test_rows_that_fill_up_are_finite_and_nan_stays_with_its_image(executor: GraphExecutor) -> None:
    for _ in range(2):
        check(executor, images(17))
    (captured,) = executor._captured.values()
    assert bool((captured.source[17:] == 0).all()), "zeros at first"
    x = images(20)
    x[17:] = torch.nan
    executor.run(x)
    check(executor, images(17))


def test_every_batch_up_to_64_keeps_its_graph(pretence: Pretence, executor: GraphExecutor) -> None:
    for n in range(1, 65):
        for _ in range(2):
            executor.run(images(n, size=1))
    assert captures(pretence) == len(executor._captured) == 28
    for n in range(1, 65):
        check(executor, images(n, n, size=1))
    assert captures(pretence) == 28


def test_a_capture_that_breaks_leaves_the_thread_as_it_was(pretence: Pretence, executor: GraphExecutor) -> None:
    run = executor.runner.run

    def waits(x: Tensor, outputs: Sequence[str] = ()) -> list[Tensor]:
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return run(x, outputs)

    side = torch.cuda.Stream()
    executor.runner.run = waits  # type: ignore[method-assign]
    with torch.cuda.stream(side):
        check(executor, images(2))
        with pytest.raises(CaptureError):
            executor.run(images(2))
        assert torch.cuda.current_stream() is side
    assert not pretence.timeline.pools_open
    executor.runner.run = run  # type: ignore[method-assign]
    with torch.cuda.stream(side):
        check(executor, images(2))
        assert captures(pretence) == 1


def test_without_memory_for_a_graph_calls_run_plainly(pretence: Pretence, executor: GraphExecutor) -> None:
    pretence.memory.for_captures = 2 * images(1).nbytes
    check(executor, images(2))
    with pytest.warns(GraphMemoryWarning, match=r"\[2, 3, 4, 4\]"):
        check(executor, images(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            check(executor, images(2))
    assert pretence.timeline.log.count("capture_begin") == 1, "it is tried once"
    assert torch.cuda.current_stream() is torch.cuda.default_stream()
    assert not pretence.timeline.pools_open
    pretence.memory.for_captures = None
    for _ in range(2):
        check(executor, images(1))
    assert pretence.timeline.log.count("replay") == 1


def test_shapes_that_come_once_push_nothing_out(pretence: Pretence, executor: GraphExecutor) -> None:
    for _ in range(2):
        executor.run(images(1))
    for size in range(5, 5 + 60):
        executor.run(images(1, size=size))
    check(executor, images(1))
    assert captures(pretence) == 1
    assert pretence.timeline.log.count("replay") == 2


def test_seventeen_shapes_have_a_graph_each(pretence: Pretence, executor: GraphExecutor) -> None:
    for _ in range(3):
        for size in range(1, 18):
            check(executor, images(1, size=size))
    assert captures(pretence) == 17


def test_streams_wait_for_one_another(pretence: Pretence, executor: GraphExecutor) -> None:
    """Graphs share memory, so each replay waits for the one before, on any stream. The fixture checks for races."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [images(n, n) for n in (1, 2, 3)]
    torch.cuda.synchronize()
    for _ in range(3):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                check(executor, x)


def test_a_graph_is_forgotten_while_another_stream_still_runs_it(pretence: Pretence) -> None:
    executor = GraphExecutor(Doubler(), Pool(CUDA), kept=1)
    inputs, side = [images(1), images(2)], torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(2):
        executor.run(inputs[0])
    with torch.cuda.stream(side):
        executor.run(inputs[0])
    for _ in range(2):
        executor.run(inputs[1])  # drops the graph whose input the other stream may still be reading
    assert len(executor._captured) == 1


def test_threads_with_streams_of_their_own(pretence: Pretence, executor: GraphExecutor) -> None:
    inputs = [images(n, n) for n in (1, 2, 17)]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(4):
                (y,) = executor.run(inputs[index])
                if not torch.equal(y, 2 * inputs[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert captures(pretence) == 3


def test_inside_a_callers_capture_it_runs_plainly(pretence: Pretence, executor: GraphExecutor) -> None:
    x = images(2)
    executor.run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = executor.run(x)
    assert bool(y.isnan().all())
    graph.replay()
    assert torch.equal(y, 2 * x)


def test_precision_is_part_of_what_a_graph_is_for(pretence: Pretence, executor: GraphExecutor) -> None:
    settings: list[Any] = ["ieee", "tf32", "ieee", "tf32"]
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in settings:
            matmul.fp32_precision = setting
            check(executor, images(2))
    finally:
        matmul.fp32_precision = before
    assert captures(pretence) == 2
