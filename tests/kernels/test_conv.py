"""The convolution kernel compared with float64, in Triton's interpreter and, if there is one, on a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from fastres.errors import DeviceError, DtypeError, KernelError
from fastres.kernels import conv, reference
from fastres.kernels.launch import INTERPRETED, needs_wide_offsets
from fastres.kernels.routing.cards import H100, MI300X
from fastres.kernels.routing.grouping import merge_groups
from fastres.kernels.routing.rules import ConvConfig, ConvShape, route_conv
from tests.measures import kernel_tolerance, relative_error

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (N, H, W, C, K, filter, stride, padding, groups): every kind of layer in ResNets, odd sizes, and other sizes.
CASES = [
    (2, 9, 7, 64, 64, 3, 1, 1, 1),
    (1, 13, 11, 64, 128, 3, 2, 1, 1),
    (3, 8, 5, 128, 64, 1, 1, 0, 1),
    (2, 9, 7, 64, 128, 1, 2, 0, 1),
    (1, 6, 7, 128, 128, 3, 1, 1, 32),  # ResNeXt, 4 channels per group
    (1, 7, 6, 128, 128, 3, 2, 1, 16),  # 8 channels per group
    (1, 5, 6, 96, 192, 3, 1, 1, 3),
    (1, 7, 6, 20, 24, 5, 3, 2, 1),
    (1, 7, 6, 24, 36, 3, 1, 1, 3),
    (1, 5, 5, 16, 10, 3, 1, 1, 1),
    (1, 4, 4, 200, 17, 1, 1, 0, 1),
    (5, 1, 1, 64, 100, 1, 1, 0, 1),
]


def make(case: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random input, weight, bias and residual for a case."""
    n, h, w, c, k, r, stride, padding, groups = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, h, w, c, generator=generator)
    weight = torch.randn(k, r, r, c // groups, generator=generator) / (r * r * c / groups) ** 0.5
    bias = torch.randn(k, generator=generator)
    p, q = (h + 2 * padding - r) // stride + 1, (w + 2 * padding - r) // stride + 1
    residual = torch.randn(n, p, q, k, generator=generator)
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE), residual.to(DEVICE, dtype)


def truth(
    case: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    *_, stride, padding, groups = case
    residual = None if residual is None else residual.double()
    return reference.conv2d(
        x.double(), weight.double(), bias, residual, stride=stride, padding=padding, groups=groups, relu=relu
    )


def reduction(weight: Tensor) -> int:
    return weight[0].numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias, residual = make(case, dtype)
    *_, stride, padding, groups = case
    merged, merged_groups = merge_groups(weight, groups)
    y = torch.ops.fastres.conv2d(x, merged, bias, residual, stride, padding, merged_groups, True)
    expected = truth(case, x, weight, bias, residual, relu=True)
    assert y.shape == expected.shape
    assert relative_error(y, expected) < kernel_tolerance(dtype, reduction(weight), truncates=INTERPRETED)


@pytest.mark.parametrize(("with_residual", "relu"), list(itertools.product((False, True), repeat=2)))
def test_every_epilogue(with_residual: bool, relu: bool) -> None:
    case = CASES[1]
    x, weight, bias, residual = make(case, torch.float32, seed=1)
    used = residual if with_residual else None
    y = torch.ops.fastres.conv2d(x, weight, bias, used, case[6], case[7], 1, relu)
    expected = truth(case, x, weight, bias, used, relu)
    assert relative_error(y, expected) < kernel_tolerance(torch.float32, reduction(weight))
    assert bool((y < 0).any()) != relu


ROUTED = sorted(
    {
        dataclasses.replace(route_conv(ConvShape(n, s, s, c, k, 3, 3, 1, 1), dtype, gpu), note="")
        for n, (s, c, k), dtype, gpu in itertools.product(
            (1, 16, 256), ((56, 64, 64), (28, 128, 512), (7, 512, 512), (14, 32, 32)), DTYPES[:2], (H100, MI300X)
        )
    },
    key=str,
)


@pytest.mark.parametrize("config", ROUTED, ids=str)
def test_every_routed_configuration(config: ConvConfig) -> None:
    """Tests the configurations for GPUs. The interpreter normally gets other ones."""
    dtype = torch.float32 if config.note else torch.float16
    case = (1, 9, 8, 72, 40, 3, 1, 1, 1)
    x, weight, bias, residual = make(case, dtype, seed=2)
    y = torch.full(residual.shape, float("nan"), dtype=dtype, device=DEVICE)
    conv.conv2d_into(y, x, weight, bias, residual, stride=1, padding=1, relu=True, config=config)
    expected = truth(case, x, weight, bias, residual, relu=True)
    assert relative_error(y, expected) < kernel_tolerance(dtype, reduction(weight))


@pytest.mark.parametrize(
    ("case", "split"), [*((CASES[i], split) for i in (0, 2, 6) for split in (2, 3, 8)), (CASES[6], 32)], ids=str
)
def test_programs_that_share_a_tile(case: tuple[int, ...], split: int) -> None:
    """Also tests more parts than the reduction has blocks. Afterwards the counters are zero for the next launch."""
    x, weight, bias, residual = make(case, torch.float16, seed=8)
    *_, stride, padding, groups = case
    config = ConvConfig("conv", 32, 32, 32, 4, 2, split=split)
    shape = conv.conv_shape(x, weight, stride, padding, groups)
    arrived = torch.zeros(conv.arrivals(shape, config) + 1, dtype=torch.int32, device=DEVICE)
    expected = truth(case, x, weight, bias, residual, relu=True)
    results = []
    for counters in (arrived, arrived, None):
        y = torch.full(residual.shape, float("nan"), dtype=torch.float16, device=DEVICE)
        conv.conv2d_into(
            y, x, weight, bias, residual,
            stride=stride, padding=padding, groups=groups, relu=True, config=config, arrived=counters,
        )  # fmt: skip
        assert relative_error(y, expected) < kernel_tolerance(torch.float16, reduction(weight))
        assert not arrived.any()
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_writes_every_output_and_nothing_else() -> None:
    """The output lies between guard pages of NaN; it starts as NaN itself."""
    case = (2, 7, 5, 32, 24, 3, 1, 1, 1)
    x, weight, bias, residual = make(case, torch.float32, seed=3)
    buffer = torch.full((3, *residual.shape), float("nan"), device=DEVICE)
    conv.conv2d_into(buffer[1], x, weight, bias, residual, stride=1, padding=1)
    assert bool(buffer[1].isfinite().all())
    assert bool(buffer[0].isnan().all())
    assert bool(buffer[2].isnan().all())


def test_output_may_be_the_residual() -> None:
    case = CASES[0]
    x, weight, bias, residual = make(case, torch.float32, seed=4)
    expected = truth(case, x, weight, bias, residual, relu=True)
    conv.conv2d_into(residual, x, weight, bias, residual, stride=1, padding=1, relu=True)
    assert relative_error(residual, expected) < kernel_tolerance(torch.float32, reduction(weight))


def test_float32_output_of_low_precision_input() -> None:
    case = CASES[11]
    x, weight, bias, _ = make(case, torch.float16, seed=5)
    y = torch.full((5, 1, 1, 100), float("nan"), dtype=torch.float32, device=DEVICE)
    conv.conv2d_into(y, x, weight, bias)
    expected = truth(case, x, weight, bias, None, relu=False)
    assert relative_error(y, expected) < kernel_tolerance(torch.float32, reduction(weight))


def test_nan_is_not_hidden_by_relu() -> None:
    case = CASES[0]
    x, weight, bias, residual = make(case, torch.float32, seed=6)
    x[0, 4, 3, 10] = float("nan")
    y = torch.ops.fastres.conv2d(x, weight, bias, residual, 1, 1, 1, True)
    assert bool(y[0, 3:6, 2:5].isnan().all())
    assert bool(y[1].isfinite().all())


def test_wide_offsets_give_the_same_result() -> None:
    case = CASES[1]
    x, weight, bias, residual = make(case, torch.float32, seed=7)
    shape = conv.conv_shape(x, weight, 2, 1, 1)
    config = ConvConfig("conv", 32, 64, 32, 4, 2)
    y = torch.full(residual.shape, float("nan"), device=DEVICE)
    constants = conv.conv_constants(shape, x.dtype, config, residual=True, relu=True, wide=True)
    sizes = (shape.M, shape.H, shape.W, shape.P, shape.Q)
    conv.conv_kernel[conv.conv_grid(shape, config)](
        x, weight, bias, residual, y, None, None, *sizes, **constants, EARLY=False
    )
    expected = truth(case, x, weight, bias, residual, relu=True)
    assert relative_error(y, expected) < kernel_tolerance(torch.float32, reduction(weight))


def test_more_than_2_31_elements() -> None:
    """The input has 4 GiB but almost no page is touched: only the strided pixels are written and read."""
    stride, size, channels = 4096, 16640, 8
    case = (1, size, size, channels, 16, 1, stride, 0, 1)
    x = torch.empty(1, size, size, channels, dtype=torch.float16, device=DEVICE)
    assert needs_wide_offsets(x)
    picked = torch.randn(1, 5, 5, channels).to(DEVICE, torch.float16)
    x[:, ::stride, ::stride] = picked
    weight = (torch.randn(16, 1, 1, channels) / channels**0.5).to(DEVICE, torch.float16)
    bias = torch.randn(16).to(DEVICE)
    y = torch.ops.fastres.conv2d(x, weight, bias, None, stride, 0, 1, False)
    expected = truth((1, 5, 5, channels, 16, 1, 1, 0, 1), picked, weight, bias, None, relu=False)
    assert case[1] * case[2] * case[3] >= 2**31
    assert relative_error(y, expected) < kernel_tolerance(torch.float16, channels)


def test_empty_batch() -> None:
    x, weight, bias, _ = make(CASES[0], torch.float32)
    assert torch.ops.fastres.conv2d(x[:0], weight, bias, None, 1, 1, 1, True).shape == (0, 9, 7, 64)


def test_bad_input_is_named() -> None:
    x, weight, bias, residual = make(CASES[0], torch.float32)
    op = torch.ops.fastres.conv2d
    with pytest.raises(KernelError, match=r"x \[2, 9, 7, 64\] has strides .*contiguous"):
        op(x.transpose(1, 2).contiguous().transpose(1, 2), weight, bias, None, 1, 1, 1, True)
    with pytest.raises(DtypeError, match="weight is float16 and must be float32"):
        op(x, weight.half(), bias, None, 1, 1, 1, True)
    with pytest.raises(DtypeError, match="bias is float16"):
        op(x, weight, bias.half(), None, 1, 1, 1, True)
    with pytest.raises(KernelError, match=r"residual is \[2, 9, 7, 32\] and must be \[2, 9, 7, 64\]"):
        op(x, weight, bias, residual[..., :32].contiguous(), 1, 1, 1, True)
    with pytest.raises(KernelError, match=r"x is \[2, 9, 7, 32\] and must be \[2, 9, 7, 64\]"):
        op(x[..., :32].contiguous(), weight, bias, None, 1, 1, 1, True)
    with pytest.raises(KernelError, match="does not fit images of 1×1"):
        op(x[:, :1, :1].contiguous(), weight, bias, None, 1, 0, 1, True)
    with pytest.raises(DeviceError, match="given tensors on meta"):
        op(x.to("meta"), weight.to("meta"), bias.to("meta"), None, 1, 1, 1, True)
