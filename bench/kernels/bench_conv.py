"""Time the convolution kernel on each distinct layer of ResNet-50: ``pytest bench/kernels/bench_conv.py`` on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.bench.measure.kernel_timing import (
    Layer,
    assert_right,
    conv_reduction,
    draw,
    draw_parameters,
    layers,
    time_kernel,
)
from fastres.executors.gpu import conv_shape
from fastres.kernels import conv, launch, reference
from fastres.kernels.routing import cards, grouping, rules
from fastres.network.plan import Conv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels, which needs a CUDA GPU")

DTYPE = torch.float16
LAYERS = [layer for batch in (1, 32) for layer in layers("conv", batch, DTYPE)]


def prepare(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """Return the launch, the tensor that it writes, and the expected values (float64)."""
    step = layer.step
    assert isinstance(step, Conv)
    x = draw(layer.shape, dtype, device)
    weight, bias = draw_parameters(step, dtype, device)
    packed, groups = grouping.merge_groups(weight, step.groups)
    shape = step.output_shape(layer.shape)
    residual = draw(shape, dtype, device) if step.residual is not None else None
    expected = reference.conv2d(
        x.double(),
        weight.double(),
        bias,
        None if residual is None else residual.double(),
        stride=step.stride,
        padding=step.padding,
        groups=step.groups,
        relu=step.relu,
    )
    y = torch.full(shape, float("nan"), dtype=dtype, device=device)

    def run() -> None:
        conv.conv2d_into(
            y, x, packed, bias, residual, stride=step.stride, padding=step.padding, groups=groups, relu=step.relu
        )

    return run, y, expected


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_conv(benchmark: Any, layer: Layer) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    run, y, expected = prepare(layer, DTYPE, device)
    run()
    assert_right(y, expected, DTYPE, conv_reduction(layer.step))
    del expected
    assert isinstance(layer.step, Conv)
    shape, precision = conv_shape(layer.step, layer.shape), launch.float32_precision()
    residual = layer.step.residual is not None
    routed = rules.route_conv(shape, DTYPE, cards.gpu_of(device), precision, residual=residual)
    time_kernel(benchmark, run, layer, DTYPE, routed)
