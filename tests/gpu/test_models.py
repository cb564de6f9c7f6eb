"""Every torchvision model on a GPU: three dtypes, three batches, three sizes, with the shared error measure."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from torch import nn

import fastres
from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.network.architectures import get_architecture
from tests.measures import Yardstick, relative_error
from tests.network.test_architectures import TORCHVISION

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = [(1, 224, 224), (3, 97, 131), (3, 256, 256), (64, 97, 131), (64, 224, 224)]


@functools.lru_cache(maxsize=1)
def network(name: str) -> nn.Module:
    return calibrated(get_architecture(name)).cuda()


@functools.lru_cache(maxsize=1)  # the dtypes of one case are consecutive
def yardstick(name: str, case: tuple[int, int, int]) -> Yardstick:
    """Two batches. A test runs the network on the first; the other shows how large eager's error can be."""
    return Yardstick(network(name), *(smooth_images(*case, seed=seed).cuda() for seed in (11, 12)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", TORCHVISION)
def test_logits(name: str, case: tuple[int, int, int], dtype: torch.dtype) -> None:
    yardstick(name, case).check(fastres.from_module(network(name), dtype=dtype), dtype, batches=1)


@pytest.fixture(scope="module")
def model() -> fastres.Model:
    return fastres.from_module(network("resnet50"))


def test_default_dtype_and_device(model: fastres.Model) -> None:
    assert model.dtype == torch.float16
    assert model.device.type == "cuda"
    assert model.cpu().dtype == torch.float32
    assert model.cuda().dtype == torch.float16


def test_tf32_is_a_switch() -> None:
    module = network("resnet18")
    measure = Yardstick(module, smooth_images(4, 97, 131, seed=3).cuda(), smooth_images(4, 97, 131, seed=4).cuda())
    (x, _), (truth, _) = measure.inputs, (values["logits"] for values in measure.truth)
    model = fastres.from_module(module, dtype=torch.float32)
    exact = relative_error(model(x), truth)
    torch.set_float32_matmul_precision("high")
    try:
        fast = relative_error(model(x), truth)
    finally:
        torch.set_float32_matmul_precision("highest")
    measure.check(model)
    assert 10 * exact < fast < 2e-2


def test_pixels(model: fastres.Model) -> None:
    x = pixels(smooth_images(5, 97, 131, seed=4)).cuda()
    mean, std = (torch.tensor(v, device="cuda").view(1, 3, 1, 1) for v in (model.transforms.mean, model.transforms.std))
    normalised = (x.float() / 255 - mean) / std
    assert relative_error(model(x), model(normalised)) < 2e-2


def test_another_stream_and_threads(model: fastres.Model) -> None:
    inputs = [smooth_images(2, 64 + 16 * i, 96, seed=i).cuda() for i in range(6)]
    expected = [model(x) for x in inputs]
    results: list[torch.Tensor | None] = [None] * len(inputs)

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                results[index] = model(inputs[index])
        stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, truth in zip(results, expected, strict=True):
        assert result is not None
        assert torch.equal(result, truth)


def test_in_a_cuda_graph(model: fastres.Model) -> None:
    x = smooth_images(4, 224, 224, seed=5).cuda()
    expected = model(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(x)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    model = fastres.from_module(copy.deepcopy(network("resnet18"))).to("cuda:1")
    x = smooth_images(2, 64, 64).to("cuda:1")
    assert model(x).device == torch.device("cuda:1")


def test_under_torch_compile(model: fastres.Model) -> None:
    x = smooth_images(2, 97, 131, seed=6).cuda()
    compiled = torch.compile(lambda x: (model(x).softmax(1), model.features(x)["layer3"] + 1), fullgraph=True)
    logits, layer3 = compiled(x)
    torch.testing.assert_close(logits, model(x).softmax(1))
    torch.testing.assert_close(layer3, model.features(x)["layer3"] + 1)


def test_kernels_are_ops_that_compile_sees_through() -> None:
    x = torch.randn(2, 14, 14, 64, device="cuda", dtype=torch.float16)
    weight = torch.randn(128, 3, 3, 64, device="cuda", dtype=torch.float16) / 24
    bias = torch.randn(128, device="cuda")

    def around(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastres.conv2d(x, weight, bias, None, 1, 1, 1, True) * 2

    import fastres.kernels.conv  # noqa: F401  (registers the op)

    torch.testing.assert_close(torch.compile(around, fullgraph=True)(x), around(x))


def test_empty_batch_and_nan(model: fastres.Model) -> None:
    assert model(torch.zeros(0, 3, 64, 64, device="cuda")).shape == (0, 1000)
    x = smooth_images(3, 64, 64).cuda()
    x[1, 0, 30, 30] = float("nan")
    logits = model(x)
    assert bool(logits[1].isnan().all())
    assert bool(logits[[0, 2]].isfinite().all())
