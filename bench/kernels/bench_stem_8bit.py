"""Time the stem of ResNet-50 in int8 and e4m3: ``pytest bench/kernels/bench_stem_8bit.py`` on a GPU.

``roofline_share`` is relative to the roofline of float16, so it shows what 8 bit gains: compare it with bench_stem.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastres.bench.measure.kernel_timing import Layer, layers, time_kernel
from fastres.bench.measure.problems_8bit import Problem, stem_problem
from fastres.kernels.conv_8bit import E4M3, LEVELS, why_not_8bit
from fastres.kernels.routing import cards
from fastres.kernels.stem_8bit import stem_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels, which needs a CUDA GPU")

LAYERS = [layer for batch in (1, 32, 256) for layer in layers("stem", batch, torch.float16)]


def prepare(layer: Layer, raw: bool, dtype: torch.dtype, device: torch.device) -> Problem:
    """Return the stem as a problem in 8 bit; ``raw`` means uint8 pixels."""
    n, size, *_ = layer.shape
    return stem_problem(n, size, dtype, device, raw=raw)


@pytest.mark.parametrize("dtype", [LEVELS, E4M3], ids=["int8", "e4m3"])
@pytest.mark.parametrize("raw", [True, False], ids=["uint8", "float16"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_stem_8bit(benchmark: Any, layer: Layer, raw: bool, dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = cards.gpu_of(device)
    if reason := why_not_8bit(dtype, gpu):
        pytest.skip(reason)
    problem = prepare(layer, raw, dtype, device)
    problem.run()
    problem.assert_right()
    n, p, q, _ = problem.y.shape
    time_kernel(benchmark, problem.run, layer, torch.float16, f"{dtype}: {stem_config(q, p, n, gpu)}")
