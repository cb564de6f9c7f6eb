"""The TMA convolution compared with float64, in Triton's interpreter and, if there is one, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastres.errors import DeviceError, DtypeError, KernelError
from fastres.kernels import reference
from fastres.kernels.conv_tma import (
    check_conv_tma,
    conv_tma,
    conv_tma_grid,
    conv_tma_into,
    conv_tma_shape,
    valid_taps,
    why_not_conv_tma,
)
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

SMALL = ConvConfig("conv_tma", 64, 64, 64, 4, 3)
WIDE = ConvConfig("conv_tma_persistent", 128, 256, 64, 8, 3)

# (N, H, W, C, K, filter, stride, padding): odd sizes, ragged blocks of images and of channels, every kind of filter.
CASES = [
    (70, 5, 4, 64, 64, 3, 1, 1),
    (64, 7, 6, 64, 128, 3, 2, 1),
    (65, 6, 5, 128, 72, 3, 2, 1),
    (130, 3, 5, 72, 320, 1, 2, 0),
    (3, 5, 4, 8, 64, 1, 1, 0),
    (64, 2, 9, 16, 24, 5, 3, 2),
    (64, 1, 1, 64, 64, 3, 1, 1),  # one of nine filter positions is inside
]
# (N, H, W, C, K, filter, stride, padding, U, shortcut stride): the last convolution of a block with its projection.
SHORTCUT_CASES = [
    (70, 4, 3, 64, 256, 1, 1, 0, 128, 2),  # bottleneck
    (64, 4, 3, 72, 64, 3, 1, 1, 40, 2),  # basic block
    (64, 3, 2, 64, 256, 1, 1, 0, 64, 1),
]


def make(case: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random x [N, H, W, C], weight [K, R, S, C], bias and residual [N, P, Q, K]."""
    n, h, w, c, k, r, stride, padding = case[:8]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, h, w, c, generator=generator)
    weight = torch.randn(k, r, r, c, generator=generator) / (r * r * c) ** 0.5
    bias = torch.randn(k, generator=generator)
    p, q = (h + 2 * padding - r) // stride + 1, (w + 2 * padding - r) // stride + 1
    residual = torch.randn(n, p, q, k, generator=generator)
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE), residual.to(DEVICE, dtype)


def make_shortcut(case: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random shortcut with one odd size, and its weight [K, 1, 1, U]."""
    n, h, w, _, k, _, _, _, u, stride = case
    generator = torch.Generator().manual_seed(seed + 100)
    shortcut = torch.randn(n, h * stride - (stride - 1), w * stride, u, generator=generator)
    weight = torch.randn(k, 1, 1, u, generator=generator) / u**0.5
    return shortcut.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def truth(
    case: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    residual = None if residual is None else residual.double()
    stride, padding = case[6:8]
    return reference.conv2d(x.double(), weight.double(), bias, residual, stride=stride, padding=padding, relu=relu)


def run(
    case: tuple[int, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    config: ConvConfig,
    *,
    relu: bool = True,
) -> Tensor:
    r, stride, padding = case[5:8]
    return conv_tma(
        x,
        weight.flatten(1),
        bias,
        residual,
        filter_size=(r, r),
        stride=stride,
        padding=padding,
        relu=relu,
        config=config,
    )


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: tuple[int, ...], dtype: torch.dtype, config: ConvConfig) -> None:
    x, weight, bias, residual = make(case, dtype)
    y = run(case, x, weight, bias, residual, config)
    expected = truth(case, x, weight, bias, residual, relu=True)
    assert y.shape == expected.shape
    assert relative_error(y, expected) < kernel_tolerance(dtype, weight[0].numel(), truncates=INTERPRETED)


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
@pytest.mark.parametrize(("with_residual", "relu"), list(itertools.product((False, True), repeat=2)))
def test_every_epilogue(with_residual: bool, relu: bool, config: ConvConfig) -> None:
    case = CASES[0]
    x, weight, bias, residual = make(case, torch.float16, seed=1)
    used = residual if with_residual else None
    y = run(case, x, weight, bias, used, config, relu=relu)
    expected = truth(case, x, weight, bias, used, relu)
    assert relative_error(y, expected) < kernel_tolerance(torch.float16, weight[0].numel())
    assert bool((y < 0).any()) != relu


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
@pytest.mark.parametrize("case", SHORTCUT_CASES, ids=str)
def test_merged_shortcut(case: tuple[int, ...], config: ConvConfig) -> None:
    x, weight, bias, residual = make(case, torch.float16, seed=2)
    shortcut, shortcut_weight = make_shortcut(case, torch.float16, seed=2)
    *_, r, stride, padding, u, shortcut_stride = case
    merged = merge_shortcut_weight(weight, shortcut_weight)
    zeros = torch.zeros_like(bias)
    for used in (None, residual):
        y = conv_tma(
            x,
            merged,
            bias,
            used,
            shortcut,
            filter_size=(r, r),
            stride=stride,
            padding=padding,
            shortcut_stride=shortcut_stride,
            relu=True,
            config=config,
        )
        added = None if used is None else used.double()
        projected = reference.conv2d(shortcut.double(), shortcut_weight.double(), zeros, added, stride=shortcut_stride)
        expected = truth(case, x, weight, bias, projected, relu=True)
        assert relative_error(y, expected) < kernel_tolerance(torch.float16, weight[0].numel() + u)


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
def test_writes_every_output_and_nothing_else(config: ConvConfig) -> None:
    """The output lies between guard pages of NaN; it starts as NaN itself."""
    case = CASES[2]
    x, weight, bias, residual = make(case, torch.float16, seed=3)
    buffer = torch.full((3, *residual.shape), float("nan"), device=DEVICE, dtype=torch.float16)
    conv_tma_into(
        buffer[1], x, weight.flatten(1), bias, residual, filter_size=(3, 3), stride=2, padding=1, config=config
    )
    assert bool(buffer[1].isfinite().all())
    assert bool(buffer[0].isnan().all())
    assert bool(buffer[2].isnan().all())


def test_pixels_and_channels_outside_x_do_not_count() -> None:
    """x lies between guard pages of NaN."""
    case = (65, 3, 4, 72, 64, 3, 1, 1)
    x, weight, bias, _ = make(case, torch.float16, seed=4)
    buffer = torch.full((3, *x.shape), float("nan"), device=DEVICE, dtype=torch.float16)
    buffer[1] = x
    y = run(case, buffer[1], weight, bias, None, SMALL)
    expected = truth(case, x, weight, bias, None, relu=True)
    assert relative_error(y, expected) < kernel_tolerance(torch.float16, weight[0].numel())


def test_output_may_be_the_residual() -> None:
    case = CASES[0]
    x, weight, bias, residual = make(case, torch.float16, seed=5)
    expected = truth(case, x, weight, bias, residual, relu=True)
    conv_tma_into(residual, x, weight.flatten(1), bias, residual, filter_size=(3, 3), padding=1, relu=True, config=WIDE)
    assert relative_error(residual, expected) < kernel_tolerance(torch.float16, weight[0].numel())


def test_nan_is_not_hidden_by_relu() -> None:
    case = (64, 6, 5, 64, 64, 3, 1, 1)
    x, weight, bias, residual = make(case, torch.float16, seed=6)
    x[3, 4, 2, 10] = float("nan")
    y = run(case, x, weight, bias, residual, SMALL)
    assert bool(y[3, 3:6, 1:4].isnan().all())
    assert int(y.isnan().sum()) == 9 * 64


def test_float32_output() -> None:
    case = CASES[4]
    x, weight, bias, _ = make(case, torch.float16, seed=7)
    y = torch.full((3, 5, 4, 64), float("nan"), device=DEVICE)
    flat = weight.flatten(1)
    check_conv_tma(y, x, flat, bias, None, None, conv_tma_shape(x, flat, (1, 1), 1, 0), 1)
    conv_tma_into(y, x, flat, bias, filter_size=(1, 1), config=SMALL)
    expected = truth(case, x, weight, bias, None, relu=False)
    assert relative_error(y, expected) < kernel_tolerance(torch.float32, 8)


def test_empty_batch() -> None:
    case = CASES[0]
    x, weight, bias, _ = make(case, torch.float16)
    assert run(case, x[:0], weight, bias, None, SMALL).shape == (0, 5, 4, 64)


def test_grid() -> None:
    shape = ConvShape(200, 7, 7, 512, 512, 3, 3, 1, 1)
    assert conv_tma_grid(shape, SMALL, H100, residual=False) == (4 * 49 * 8,)
    assert conv_tma_grid(shape, WIDE, H100, residual=False) == (H100.multiprocessors,)
    assert conv_tma_grid(ConvShape(64, 4, 4, 64, 64, 1, 1, 1, 0), WIDE, H100, residual=False) == (16,)


def test_valid_taps() -> None:
    assert valid_taps(ConvShape(64, 7, 7, 512, 512, 3, 3, 1, 1)) == pytest.approx((19 / 21) ** 2)
    assert valid_taps(ConvShape(64, 14, 14, 512, 512, 3, 3, 2, 1)) == pytest.approx((20 / 21) ** 2)
    assert valid_taps(ConvShape(64, 1, 1, 64, 64, 3, 3, 1, 1)) == pytest.approx(1 / 9)
    assert valid_taps(ConvShape(64, 7, 7, 512, 512, 1, 1, 1, 0)) == 1


def test_what_the_kernel_takes() -> None:
    shape = ConvShape(64, 14, 14, 256, 256, 3, 3, 2, 1)
    assert why_not_conv_tma(shape, torch.float16, H100) == ""
    assert "sm_80" in why_not_conv_tma(shape, torch.float16, A100)
    assert "not float32" in why_not_conv_tma(shape, torch.float32, H100)
    assert "not 63" in why_not_conv_tma(ConvShape(63, 14, 14, 256, 256, 3, 3, 1, 1), torch.float16, H100)
    assert "groups" in why_not_conv_tma(ConvShape(64, 14, 14, 8, 8, 3, 3, 1, 1, 32), torch.float16, H100)
    assert "must be smaller than" in why_not_conv_tma(ConvShape(64, 14, 14, 64, 64, 1, 1, 1, 1), torch.float16, H100)
    assert "not 12" in why_not_conv_tma(ConvShape(64, 14, 14, 12, 64, 3, 3, 1, 1), torch.float16, H100)


def test_bad_input_is_named() -> None:
    case = CASES[0]
    x, weight, bias, residual = make(case, torch.float16)
    with pytest.raises(KernelError, match=r"weight is \[64, 576\] and must be \[64, 64\]"):
        conv_tma(x, weight.flatten(1), bias, filter_size=(1, 1), config=SMALL)
    with pytest.raises(KernelError, match=r"residual is \[70, 5, 4, 32\] and must be \[70, 5, 4, 64\]"):
        run(case, x, weight, bias, residual[..., :32].contiguous(), SMALL)
    with pytest.raises(KernelError, match="does not fit images of 1×1"):
        conv_tma(x[:, :1, :1].contiguous(), weight.flatten(1), bias, filter_size=(3, 3), config=SMALL)
    with pytest.raises(KernelError, match="padding 3 must be smaller"):
        conv_tma(x, weight.flatten(1), bias, filter_size=(3, 3), padding=3, config=SMALL)
    merged = merge_shortcut_weight(weight, weight[:, :1, :1].contiguous())
    with pytest.raises(KernelError, match=r"shortcut is \[70, 5, 4, 64\]; at stride 2 .* 3×2 and must be 70 of 5×4"):
        conv_tma(x, merged, bias, None, residual, filter_size=(3, 3), padding=1, shortcut_stride=2, config=SMALL)
    with pytest.raises(DtypeError, match="residual is bfloat16 and must be float16"):
        run(case, x, weight, bias, residual.bfloat16(), SMALL)
    with pytest.raises(DeviceError, match="given tensors on meta"):
        run(case, x.to("meta"), weight.to("meta"), bias.to("meta"), None, SMALL)
