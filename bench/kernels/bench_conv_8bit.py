"""Time the convolution in int8 and e4m3 on ResNet-50's layers: ``pytest bench/kernels/bench_conv_8bit.py`` on a GPU.

``roofline_share`` is relative to the roofline of float16, so it shows what 8 bit gains: compare it with bench_conv.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastres.bench.measure.kernel_timing import Layer, layers, time_kernel
from fastres.bench.measure.problems_8bit import Problem, conv_problem
from fastres.executors.gpu import conv_shape
from fastres.kernels.conv_8bit import E4M3, LEVELS, default_config, why_not_8bit
from fastres.kernels.routing import cards
from fastres.network.plan import Conv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels, which needs a CUDA GPU")

LAYERS = [layer for batch in (1, 32, 256) for layer in layers("conv", batch, torch.float16)]


def prepare(layer: Layer, dtype: torch.dtype, device: torch.device) -> Problem:
    """Return the layer as a problem in 8 bit."""
    step = layer.step
    assert isinstance(step, Conv)
    shape = conv_shape(step, layer.shape)
    return conv_problem(shape, dtype, device, residual=step.residual is not None, relu=step.relu)


@pytest.mark.parametrize("dtype", [LEVELS, E4M3], ids=["int8", "e4m3"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_conv_8bit(benchmark: Any, layer: Layer, dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, step = cards.gpu_of(device), layer.step
    if reason := why_not_8bit(dtype, gpu):
        pytest.skip(reason)
    problem = prepare(layer, dtype, device)
    problem.run()
    problem.assert_right()
    assert isinstance(step, Conv)
    config = default_config(conv_shape(step, layer.shape), dtype, gpu, residual=step.residual is not None)
    time_kernel(benchmark, problem.run, layer, torch.float16, f"{dtype}: {config}")
