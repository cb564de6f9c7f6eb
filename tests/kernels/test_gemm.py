"""The TMA matrix product compared with float64, in Triton's interpreter and, if there is one, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastres.errors import DeviceError, DtypeError, KernelError
from fastres.kernels import reference
from fastres.kernels.gemm import check_gemm, gemm, gemm_grid, gemm_into, why_not_gemm
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import A100, H100
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.tma import merge_shortcut_weight
from tests.measures import kernel_tolerance, relative_error
from tests.subjects import HOPPER

pytestmark = (
    [pytest.mark.interpreter]
    if INTERPRETED
    else [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="the kernel is written for sm_90")]
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float16, torch.bfloat16)

SMALL = ConvConfig("gemm", 64, 64, 64, 4, 3)
WIDE = ConvConfig("gemm_persistent", 128, 256, 64, 8, 3)

# (M, C, K): whole tiles, ragged ones in every direction, fewer rows than a tile.
SHAPES = [(256, 128, 256), (190, 64, 64), (64, 72, 200), (5, 8, 1000), (130, 200, 24)]


def make(m: int, c: int, k: int, u: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Random x [m, c], weight [k, c + u], bias, residual [m, k], shortcut [m, u]."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, shortcut = (torch.randn(m, size, generator=generator) for size in (c, k, u))
    weight = torch.randn(k, c + u, generator=generator) / (c + u) ** 0.5
    bias = torch.randn(k, generator=generator)
    return (
        x.to(DEVICE, dtype),
        weight.to(DEVICE, dtype),
        bias.to(DEVICE),
        residual.to(DEVICE, dtype),
        shortcut.to(DEVICE, dtype),
    )


def truth(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, shortcut: Tensor | None, relu: bool
) -> Tensor:
    """Two 1×1 convolutions added, each as the reference defines it."""
    c = x.shape[1]
    image = [None if t is None else t.double()[:, None, None] for t in (x, residual, shortcut)]
    added = image[1]
    kernel = weight.double()[:, None, None]
    if image[2] is not None:
        added = reference.conv2d(image[2], kernel[..., c:], torch.zeros_like(bias), added)
    return reference.conv2d(image[0], kernel[..., :c], bias, added, relu=relu)[:, 0, 0]


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, int, int], dtype: torch.dtype, config: ConvConfig) -> None:
    x, weight, bias, residual, _ = make(*shape, 0, dtype)
    y = gemm(x, weight, bias, residual, relu=True, config=config)
    expected = truth(x, weight, bias, residual, None, relu=True)
    assert y.shape == expected.shape
    assert relative_error(y, expected) < kernel_tolerance(dtype, shape[1], truncates=INTERPRETED)


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
@pytest.mark.parametrize(("with_residual", "relu"), list(itertools.product((False, True), repeat=2)))
def test_every_epilogue(with_residual: bool, relu: bool, config: ConvConfig) -> None:
    x, weight, bias, residual, _ = make(150, 64, 320, 0, torch.float16, seed=1)
    used = residual if with_residual else None
    y = gemm(x, weight, bias, used, relu=relu, config=config)
    assert relative_error(y, truth(x, weight, bias, used, None, relu)) < kernel_tolerance(torch.float16, 64)
    assert bool((y < 0).any()) != relu


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
@pytest.mark.parametrize(("c", "u"), [(64, 128), (128, 64), (72, 40)])
def test_merged_shortcut(c: int, u: int, config: ConvConfig) -> None:
    x, weight, bias, residual, shortcut = make(150, c, 256, u, torch.float16, seed=2)
    kernels = weight[:, None, None]
    merged = merge_shortcut_weight(kernels[..., :c], kernels[..., c:])
    assert torch.equal(merged, weight)
    for used in (None, residual):
        y = gemm(x, merged, bias, used, shortcut, relu=True, config=config)
        expected = truth(x, weight, bias, used, shortcut, relu=True)
        assert relative_error(y, expected) < kernel_tolerance(torch.float16, c + u)


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
def test_writes_every_output_and_nothing_else(config: ConvConfig) -> None:
    """The output lies between guard pages of NaN; it starts as NaN itself."""
    x, weight, bias, residual, _ = make(70, 64, 72, 0, torch.float16, seed=3)
    buffer = torch.full((3, *residual.shape), float("nan"), device=DEVICE, dtype=torch.float16)
    gemm_into(buffer[1], x, weight, bias, residual, config=config)
    assert bool(buffer[1].isfinite().all())
    assert bool(buffer[0].isnan().all())
    assert bool(buffer[2].isnan().all())


def test_channels_past_the_end_of_x_do_not_count() -> None:
    """Boxes of x and of the weights reach past C, where memory is NaN."""
    c, config = 72, SMALL
    memory = torch.full((2, 150, c), float("nan"), dtype=torch.float16, device=DEVICE)
    x, weight, bias, _, _ = make(150, c, 64, 0, torch.float16, seed=4)
    memory[0] = x
    y = gemm(memory[0], weight, bias, config=config)
    assert relative_error(y, truth(x, weight, bias, None, None, relu=False)) < kernel_tolerance(torch.float16, c)


def test_output_may_be_the_residual() -> None:
    x, weight, bias, residual, _ = make(300, 64, 256, 0, torch.float16, seed=5)
    expected = truth(x, weight, bias, residual, None, relu=True)
    gemm_into(residual, x, weight, bias, residual, relu=True, config=WIDE)
    assert relative_error(residual, expected) < kernel_tolerance(torch.float16, 64)


def test_float32_output() -> None:
    x, weight, bias, _, _ = make(37, 64, 1000, 0, torch.float16, seed=6)
    y = torch.full((37, 1000), float("nan"), device=DEVICE)
    check_gemm(y, x, weight, bias, None, None)
    gemm_into(y, x, weight, bias, config=ConvConfig("gemm", 64, 128, 64, 4, 3))
    assert relative_error(y, truth(x, weight, bias, None, None, relu=False)) < kernel_tolerance(torch.float32, 64)


def test_nan_is_not_hidden_by_relu() -> None:
    x, weight, bias, residual, _ = make(130, 64, 64, 0, torch.float16, seed=7)
    x[65, 10] = float("nan")
    y = gemm(x, weight, bias, residual, relu=True, config=SMALL)
    assert bool(y[65].isnan().all())
    assert bool(y[:65].isfinite().all())
    assert bool(y[66:].isfinite().all())


def test_empty() -> None:
    x, weight, bias, _, _ = make(3, 64, 64, 0, torch.float16)
    assert gemm(x[:0], weight, bias, config=SMALL).shape == (0, 64)


def test_grid() -> None:
    assert gemm_grid(1000, 256, SMALL, H100, residual=True) == (16 * 4,)
    assert gemm_grid(1000, 256, WIDE, H100, residual=True) == (8,)
    assert gemm_grid(100_000, 1024, WIDE, H100, residual=True) == (H100.multiprocessors,)
    two = ConvConfig("gemm_persistent", 128, 128, 64, 8, 3)
    assert gemm_grid(100_000, 1024, two, H100, residual=False) == (2 * H100.multiprocessors,)
    assert gemm_grid(100_000, 1024, two, H100, residual=True) == (H100.multiprocessors,)


def test_what_the_kernel_takes() -> None:
    shape = ConvShape(64, 14, 14, 256, 1024, 1, 1, 1, 0)
    assert why_not_gemm(shape, torch.float16, H100) == ""
    assert "sm_80" in why_not_gemm(shape, torch.float16, A100)
    assert "not float32" in why_not_gemm(shape, torch.float32, H100)
    assert "stride 1" in why_not_gemm(ConvShape(64, 14, 14, 256, 1024, 1, 1, 2, 0), torch.float16, H100)
    assert "not 20" in why_not_gemm(ConvShape(64, 14, 14, 256, 20, 1, 1, 1, 0), torch.float16, H100)


def test_bad_input_is_named() -> None:
    x, weight, bias, residual, shortcut = make(16, 64, 64, 64, torch.float16)
    weight = weight[:, :64].contiguous()
    with pytest.raises(KernelError, match=r"weight is \[64, 64\] and must be \[64, 128\]"):
        gemm(x, weight, bias, residual, shortcut, config=SMALL)
    with pytest.raises(KernelError, match=r"residual is \[8, 64\] and must be \[16, 64\]"):
        gemm(x, weight, bias, residual[:8], config=SMALL)
    with pytest.raises(DtypeError, match="x is float32 and must be float16, bfloat16"):
        gemm(x.float(), weight, bias, config=SMALL)
    with pytest.raises(DtypeError, match="weight is bfloat16 and must be float16"):
        gemm(x, weight.bfloat16(), bias, config=SMALL)
    with pytest.raises(KernelError, match=r"x is \[16, 20\].*divisible by 8, not 20"):
        gemm(x[:, :20].contiguous(), weight[:, :20].contiguous(), bias, config=SMALL)
    with pytest.raises(KernelError, match="starts 2 bytes past a multiple of 16"):
        gemm(x.flatten()[1:961].view(15, 64), weight, bias, config=SMALL)
    with pytest.raises(KernelError, match="has strides"):
        gemm(x.T, weight, bias, config=SMALL)
    with pytest.raises(DeviceError, match="given tensors on meta"):
        gemm(x.to("meta"), weight.to("meta"), bias.to("meta"), config=SMALL)
