"""CUDA graphs on a GPU: the same results as plain launches, from any stream, in memory that the caller owns."""

from __future__ import annotations

import threading

import pytest
import torch

import fastres
from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.executors.gpu import GpuExecutor
from fastres.executors.graphs import GraphExecutor
from fastres.network.architectures import get_architecture

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
    assert x.shape not in {key[0] for key in executor._captured}
    model(x)
    assert x.shape in {key[0] for key in executor._captured}


def test_warmup_captures(model: fastres.Model) -> None:
    model.warmup((1, 2), image_size=(72, 88))
    executor = model._executor
    assert isinstance(executor, GraphExecutor)
    found = {(key[0][0], key[1]) for key in executor._captured if key[0][2:] == (72, 88)}
    assert found == {(n, dtype) for n in (1, 2) for dtype in (torch.float32, torch.float16, torch.uint8)}


@pytest.mark.parametrize("layout", ["channels last", "strided", "unaligned"])
def test_layouts_and_modes_may_change_between_calls(model: fastres.Model, layout: str) -> None:
    wide = smooth_images(2, 66, 134).cuda()
    unaligned = torch.empty(wide[..., :67].numel() + 1, device="cuda")[1:].view(2, 3, 66, 67).copy_(wide[..., :67])
    inputs = {
        "channels last": wide[..., :67].to(memory_format=torch.channels_last),
        "strided": wide[..., ::2],
        "unaligned": unaligned,
    }
    for turn, x in enumerate((inputs[layout], wide[..., :67].contiguous(), inputs[layout])):
        with torch.inference_mode(turn % 2 == 1):
            assert torch.equal(model(x), eager(model, x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_sizes_share_graphs(model: fastres.Model, dtype: torch.dtype) -> None:
    x = (100 * smooth_images(20, 64, 80).abs()).cuda().to(dtype)
    expected = [eager(model, x)[:n] for n in (17, 18, 19, 20)]
    for _ in range(3):
        for n, truth in zip((17, 18, 19, 20), expected, strict=True):
            assert torch.equal(model(x[:n]), truth)


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
