"""Average pool and classifier compared with float64."""

from __future__ import annotations

import pytest
import torch

from fastres.errors import KernelError
from fastres.kernels import head, reference
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.rules import PoolConfig
from tests.measures import kernel_tolerance, relative_error

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("shape", [(3, 7, 7, 2048), (2, 4, 5, 96), (1, 1, 1, 512), (5, 3, 11, 17)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_average_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5).to(DEVICE, dtype)
    y = torch.ops.fastres.average_pool(x)
    tolerance = kernel_tolerance(dtype, shape[1] * shape[2], truncates=INTERPRETED)
    assert relative_error(y, reference.average_pool(x.double())) < tolerance


def test_average_pool_block_sizes() -> None:
    x = torch.randn(2, 5, 7, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for block_c, block_hw in ((16, 1), (64, 8), (32, 64)):
        y = torch.full((2, 40), float("nan"), device=DEVICE)
        head.average_pool_into(y, x, config=PoolConfig("average_pool", block_c, block_hw, 4))
        assert relative_error(y, reference.average_pool(x.double())) < kernel_tolerance(torch.float32, 35)


@pytest.mark.parametrize(("n", "channels", "classes"), [(1, 512, 1000), (37, 64, 10), (3, 100, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(n: int, channels: int, classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, channels, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(classes, channels, generator=generator) / channels**0.5).to(DEVICE, dtype)
    bias = torch.randn(classes, generator=generator).to(DEVICE)
    y = torch.ops.fastres.linear(x, weight, bias)
    assert y.dtype == torch.float32
    expected = reference.linear(x.double(), weight.double(), bias)
    assert relative_error(y, expected) < kernel_tolerance(torch.float32, channels)


def test_empty_batches() -> None:
    x = torch.zeros(0, 7, 7, 64, device=DEVICE)
    assert torch.ops.fastres.average_pool(x).shape == (0, 64)
    weight, bias = torch.zeros(10, 64, device=DEVICE), torch.zeros(10, device=DEVICE)
    assert torch.ops.fastres.linear(x[:, 0, 0], weight, bias).shape == (0, 10)


def test_bad_input_is_named() -> None:
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(10, 32, device=DEVICE)
    with pytest.raises(KernelError, match=r"weight is \[10, 32\] and must be \[10, 64\]"):
        torch.ops.fastres.linear(x, weight, torch.zeros(10, device=DEVICE))
