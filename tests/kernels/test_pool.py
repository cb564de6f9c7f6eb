"""Window pools compared with float64."""

from __future__ import annotations

import pytest
import torch

from fastres.errors import KernelError
from fastres.kernels import pool, reference
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.rules import PoolConfig
from tests.measures import kernel_tolerance, relative_error

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    "shape", [(2, 12, 10, 64), (3, 7, 9, 96), (1, 1, 1, 256), (2, 1, 6, 8), (1, 19, 25, 40)], ids=str
)
@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_even_and_odd_sizes(shape: tuple[int, ...], mode: str, dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) - 1).to(DEVICE, dtype)
    y = torch.ops.fastres.window_pool(x, mode)
    expected = reference.window_pool(x.double(), mode)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    tolerance = 0 if mode == "max" else kernel_tolerance(dtype, 4, truncates=INTERPRETED)
    assert relative_error(y, expected) <= tolerance


@pytest.mark.parametrize("mode", ["max", "average"])
def test_block_sizes(mode: str) -> None:
    x = torch.randn(2, 5, 7, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for block_c, block_hw in ((16, 1), (64, 8), (32, 64)):
        y = torch.full((2, 3, 4, 40), float("nan"), device=DEVICE)
        pool.window_pool_into(y, x, mode=mode, config=PoolConfig("window_pool", block_c, block_hw, 4))
        assert relative_error(y, reference.window_pool(x.double(), mode)) <= kernel_tolerance(torch.float32, 4)


@pytest.mark.parametrize("mode", ["max", "average"])
def test_nan_is_kept(mode: str) -> None:
    x = torch.zeros(1, 8, 8, 16, device=DEVICE)
    x[0, 5, 5, 3] = float("nan")
    y = torch.ops.fastres.window_pool(x, mode)
    assert y.isnan().nonzero().tolist() == (
        [[0, p, q, 3] for p in (2, 3) for q in (2, 3)] if mode == "max" else [[0, 2, 2, 3]]
    )


def test_empty_batches_and_bad_input() -> None:
    x = torch.zeros(0, 7, 7, 64, device=DEVICE)
    assert torch.ops.fastres.window_pool(x, "max").shape == (0, 4, 4, 64)
    with pytest.raises(KernelError, match="mode is 'min' and must be 'max' or 'average'"):
        torch.ops.fastres.window_pool(x, "min")
