"""CUDA graphs on a GPU: the same results as plain launches, from any stream, in the caller's own memory."""

from __future__ import annotations

import threading

import pytest
import torch

import fastres
from fastres.architectures import get_architecture
from fastres.bench.calibration import calibrated, smooth_images
from fastres.gpu import GpuExecutor
from fastres.graphs import GraphExecutor

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> fastres.Model:
    return fastres.from_module(calibrated(get_architecture("resnet18")).cuda())


def eager(model: fastres.Model, x: torch.Tensor) -> torch.Tensor:
    return GpuExecutor(model.plan).run(x)[0]


def test_replays_give_what_launches_give(model: fastres.Model) -> None:
    inputs = [smooth_images(2, 97, 131, seed=seed).cuda() for seed in range(5)]
    results = [model(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, eager(model, x))


def test_the_second_call_captures(model: fastres.Model) -> None:
    executor = model._executor
    assert isinstance(executor, GraphExecutor)
    x = smooth_images(1, 65, 65).cuda()
    model(x)
    assert [captured for key, captured in executor._captured.items() if key[0] == x.shape] == [None]
    model(x)
    assert [captured for key, captured in executor._captured.items() if key[0] == x.shape] != [None]


def test_warmup_captures(model: fastres.Model) -> None:
    model.warmup((1, 2), image_size=(72, 88))
    executor = model._executor
    assert isinstance(executor, GraphExecutor)
    found = {key[0][0] for key, captured in executor._captured.items() if key[0][2:] == (72, 88) and captured}
    assert found == {1, 2}


def test_streams_and_threads_share_the_pool(model: fastres.Model) -> None:
    inputs = [smooth_images(1, 64 + 8 * i, 96, seed=i).cuda() for i in range(4)]
    expected = [eager(model, x) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [model(inputs[index]) for _ in range(20)]
            wrong.extend(index for result in results if not torch.equal(result, expected[index]))
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
