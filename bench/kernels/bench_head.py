"""Time the average pool and the classifier of ResNet-50: ``pytest bench/kernels/bench_head.py`` on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.bench.measure.kernel_timing import Layer, assert_right, draw, draw_parameters, layers, time_kernel
from fastres.kernels import dispatch, head, launch, reference
from fastres.kernels.routing import cards, rules

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels, which needs a CUDA GPU")

DTYPE = torch.float16
LAYERS = [layer for batch in (1, 32) for layer in layers("head", batch, DTYPE)]


def prepare_pool(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """Return the launch of the average pool, the tensor that it writes, and the expected values (float64)."""
    n, _, _, c = layer.shape
    x = draw(layer.shape, dtype, device).relu()
    y = torch.full((n, c), float("nan"), dtype=dtype, device=device)
    return lambda: head.average_pool_into(y, x), y, reference.average_pool(x.double())


def prepare_linear(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """Return the launch of the classifier, the logits (float32) that it writes, and the expected logits (float64)."""
    n, _, _, c = layer.shape
    x = draw((n, c), dtype, device)
    weight, bias = draw_parameters(layer.step, dtype, device)
    y = torch.full((n, weight.shape[0]), float("nan"), device=device)
    expected = reference.linear(x.double(), weight.double(), bias)
    return lambda: head.linear_into(y, x, weight, bias), y, expected


def parts(layer: Layer) -> tuple[Layer, Layer]:
    """Split the head's cost into its two kernels: the average pool, which reads the feature map, and the classifier."""
    n, h, w, c = layer.shape
    size = DTYPE.itemsize
    pool = replace(layer, flops=n * h * w * c, bytes=(n * h * w * c + n * c) * size)
    linear = replace(layer, bytes=layer.bytes - n * h * w * c * size + n * c * size)
    return pool, linear


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_average_pool(benchmark: Any, layer: Layer) -> None:
    run, y, expected = prepare_pool(layer, DTYPE, torch.device("cuda", torch.cuda.current_device()))
    run()
    assert_right(y, expected, DTYPE, layer.shape[1] * layer.shape[2])
    config = rules.route_pool(layer.shape[3], layer.shape[1] * layer.shape[2])
    time_kernel(benchmark, run, parts(layer)[0], DTYPE, config)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_linear(benchmark: Any, layer: Layer) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    run, y, expected = prepare_linear(layer, DTYPE, device)
    run()
    classes, features = layer.step.weight.shape
    assert_right(y, expected, torch.float32, features)
    shape, precision = head.linear_shape(layer.shape[0], features, classes), launch.float32_precision()
    routed = dispatch.route(shape, DTYPE, cards.gpu_of(device), precision=precision, classifier=True)
    time_kernel(benchmark, run, parts(layer)[1], DTYPE, routed)
