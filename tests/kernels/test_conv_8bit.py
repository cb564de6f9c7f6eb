"""The 8-bit convolution compared with exact integers and with float64, in the interpreter and, if any, on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.errors import DtypeError, KernelError
from fastres.kernels import conv_8bit, reference
from fastres.kernels.conv_8bit import E4M3, LEVELS, compensation, conv2d_8bit_into, default_config, why_not_8bit
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import A100, H100, L4, MI300X, T4
from fastres.kernels.routing.grouping import merge_groups
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from tests.kernels.test_conv import CASES
from tests.measures import kernel_tolerance, relative_error

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
NO_E4M3 = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
needs_e4m3 = pytest.mark.skipif(NO_E4M3, reason="this GPU has no e4m3")

SCALES = {"x_scale": 0.03, "residual_scale": 0.05, "residual_zero_point": 97}


def make(case: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random input, weight, scales of the weight, bias and residual for a case."""
    n, h, w, c, k, r, stride, padding, groups = case
    generator = torch.Generator().manual_seed(seed)
    p, q = (h + 2 * padding - r) // stride + 1, (w + 2 * padding - r) // stride + 1
    sizes = (n, h, w, c), (k, r, r, c // groups), (n, p, q, k)
    if dtype == LEVELS:
        x, residual = (torch.randint(0, 256, size, dtype=dtype, generator=generator) for size in (sizes[0], sizes[2]))
        weight = torch.randint(-127, 128, sizes[1], dtype=torch.int8, generator=generator)
        spread = 0.03 * 150 * 73 * weight[0].numel() ** 0.5
    else:
        x, weight, residual = (torch.randn(size, generator=generator).mul(8).to(dtype) for size in sizes)
        spread = 0.03 * 64 * weight[0].numel() ** 0.5
    # Results have a standard deviation of some 2, and channels differ.
    weight_scale = (0.5 + torch.rand(k, generator=generator)) * 2 / spread
    bias = torch.randn(k, generator=generator)
    x, weight, weight_scale, bias, residual = (t.to(DEVICE) for t in (x, weight, weight_scale, bias, residual))
    return x, weight, weight_scale, bias, residual


def exact(case: tuple[int, ...], tensors: tuple[Tensor, ...], relu: bool, with_residual: bool, **scales: Any) -> Tensor:
    """The result by the reference: float64, or levels if ``scales`` has an output scale."""
    x, weight, weight_scale, bias, residual = tensors
    *_, stride, padding, groups = case
    added = (residual, scales.pop("residual_scale"), scales.pop("residual_zero_point")) if with_residual else ()
    scales = {name: value for name, value in scales.items() if "residual" not in name}
    return reference.quantised_conv2d(
        x, scales.pop("x_scale"), weight, weight_scale, bias, *added,
        stride=stride, padding=padding, groups=groups, relu=relu, **scales,
    )  # fmt: skip


def assert_levels(found: Tensor, expected: Tensor) -> None:
    """Levels may differ by one where a result lies half-way between two, which is rare."""
    assert found.dtype == expected.dtype == LEVELS
    assert found.shape == expected.shape
    difference = (found.int() - expected.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference == 0).double().mean()) > 0.999
    assert expected.unique().numel() > 60, "the levels are hardly used"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_levels(case: tuple[int, ...]) -> None:
    tensors = x, weight, weight_scale, bias, residual = make(case, LEVELS)
    *_, stride, padding, groups = case
    merged, merged_groups = merge_groups(weight, groups)
    scales = SCALES | {"output_scale": 0.04, "output_zero_point": 120}
    y = torch.ops.fastres.conv2d_8bit(
        x, merged, weight_scale, bias, residual, **scales, stride=stride, padding=padding, groups=merged_groups
    )
    assert_levels(y, exact(case, tensors, relu=False, with_residual=True, **scales))


@needs_e4m3
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 3, 4, 7, 9)], ids=str)
def test_e4m3(case: tuple[int, ...]) -> None:
    """Compares results in float32, before they are rounded to e4m3."""
    tensors = x, weight, weight_scale, bias, residual = make(case, E4M3)
    *_, stride, padding, groups = case
    merged, merged_groups = merge_groups(weight, groups)
    scales = SCALES | {"residual_zero_point": 0}
    y = torch.ops.fastres.conv2d_8bit(
        x, merged, weight_scale, bias, residual, **scales, stride=stride, padding=padding, groups=merged_groups
    )
    expected = exact(case, tensors, relu=False, with_residual=True, **scales)
    assert y.dtype == torch.float32
    # Hopper's tensor cores keep some 14 bits of sums of e4m3 products.
    limit = kernel_tolerance(torch.float32, weight[0].numel()) if INTERPRETED else 2**-10
    assert relative_error(y, expected) < limit


@needs_e4m3
def test_e4m3_output() -> None:
    case = CASES[0]
    x, weight, weight_scale, bias, residual = make(case, E4M3, seed=1)
    scales = SCALES | {"residual_zero_point": 0}
    shape = {"stride": 1, "padding": 1, "relu": False}
    wide, y = torch.full(residual.shape, float("nan"), device=DEVICE), torch.full_like(residual, float("nan"))
    conv2d_8bit_into(wide, x, weight, weight_scale, bias, residual, **scales, **shape)
    # Two of three results are saturated.
    conv2d_8bit_into(y, x, weight, weight_scale, bias, residual, output_scale=2e-3, **scales, **shape)
    expected = (wide.double() / 2e-3).clamp(-448, 448)
    assert bool((y.double().abs() <= 448).all())
    saturated = expected.abs() == 448
    assert 0.2 < float(saturated.double().mean()) < 0.95
    assert torch.equal(y.double()[saturated], expected[saturated])
    if INTERPRETED:  # its conversion halves numbers whose rounding carries into the exponent
        mantissa = expected.abs() / 2 ** expected.abs().log2().floor()
        expected, y = expected[mantissa < 1.9], y[mantissa < 1.9]
    error = ((y.double() - expected) / expected).abs()
    assert float(error[expected.abs() > 2**-6].max()) < 2**-4 * 1.001


@pytest.mark.parametrize(("with_residual", "relu"), list(itertools.product((False, True), repeat=2)))
def test_every_epilogue(with_residual: bool, relu: bool) -> None:
    """Starts from a wrong output, and takes the sums of the weights as given."""
    case = CASES[1]
    tensors = x, weight, weight_scale, bias, residual = make(case, LEVELS, seed=2)
    scales = SCALES | {"output_scale": 0.02 if relu else 0.04, "output_zero_point": 0 if relu else 131}
    expected = exact(case, tensors, relu, with_residual, **scales)
    y = 255 - expected
    conv2d_8bit_into(
        y, x, weight, weight_scale, bias, residual if with_residual else None,
        stride=2, padding=1, relu=relu, added=compensation(weight), **scales,
    )  # fmt: skip
    assert_levels(y, expected)


def test_the_largest_numbers_do_not_overflow() -> None:
    case = (1, 3, 3, 512, 16, 3, 1, 1, 1)
    x, weight, weight_scale, bias, _ = make(case, LEVELS)
    x.fill_(255)
    weight[:8], weight[8:] = 127, -128
    y = torch.ops.fastres.conv2d_8bit(x, weight, weight_scale, bias, None, 1.0, stride=1, padding=1)
    expected = reference.quantised_conv2d(x, 1.0, weight, weight_scale, bias, stride=1, padding=1)
    assert relative_error(y, expected) < 1e-6


def test_ties_go_to_the_even_number_before_the_zero_point() -> None:
    x = torch.arange(32, dtype=LEVELS, device=DEVICE).view(1, 1, 32, 1).repeat(1, 1, 1, 32)
    weight = torch.zeros(16, 1, 1, 32, dtype=torch.int8, device=DEVICE)
    weight[:, :, :, 0] = 1
    ones, zeros = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    y = torch.ops.fastres.conv2d_8bit(x, weight, ones, zeros - 4.0, None, 0.5, output_scale=1.0, output_zero_point=3)
    expected = ((torch.arange(32).double() / 2 - 4).round() + 3).clamp(0, 255)
    assert torch.equal(y[0, 0, :, 0].cpu().double(), expected)
    assert expected[:6].tolist() == [0, 0, 0, 1, 1, 1]


DEFAULTS = sorted(
    {
        default_config(ConvShape(n, s, s, c, k, 3, 3, 1, 1), dtype, gpu, residual=residual)
        for n, (s, c, k), dtype, gpu, residual in itertools.product(
            (1, 256), ((56, 64, 64), (28, 128, 512), (14, 32, 32)), (LEVELS, E4M3), (H100, L4, MI300X), (False, True)
        )
    },
    key=str,
)


@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_every_default_configuration(config: ConvConfig) -> None:
    """Tests the configurations for GPUs. The interpreter normally gets other ones."""
    case = (1, 9, 8, 72, 40, 3, 1, 1, 1)
    tensors = x, weight, weight_scale, bias, residual = make(case, LEVELS, seed=3)
    scales = SCALES | {"output_scale": 0.04, "output_zero_point": 120}
    expected = exact(case, tensors, relu=False, with_residual=True, **scales)
    y = 255 - expected
    conv2d_8bit_into(y, x, weight, weight_scale, bias, residual, stride=1, padding=1, config=config, **scales)
    assert_levels(y, expected)


def test_writes_every_output_and_nothing_else() -> None:
    case = (2, 7, 5, 32, 24, 3, 1, 1, 1)
    tensors = x, weight, weight_scale, bias, residual = make(case, LEVELS, seed=4)
    scales = SCALES | {"output_scale": 0.04, "output_zero_point": 120}
    expected = exact(case, tensors, relu=False, with_residual=True, **scales)
    buffer = torch.stack([torch.full_like(expected, 77), 255 - expected, torch.full_like(expected, 77)])
    conv2d_8bit_into(buffer[1], x, weight, weight_scale, bias, residual, stride=1, padding=1, **scales)
    assert_levels(buffer[1], expected)
    assert bool((buffer[[0, 2]] == 77).all())


def test_wide_offsets_give_the_same_result() -> None:
    case = CASES[1]
    tensors = x, weight, weight_scale, bias, residual = make(case, LEVELS, seed=5)
    shape, config = conv_8bit.conv_shape(x, weight, 2, 1, 1), ConvConfig("conv_8bit", 32, 64, 32, 4, 2)
    y = torch.full(residual.shape, float("nan"), device=DEVICE)
    constants = conv_8bit.conv_8bit_constants(shape, config, residual=True, relu=True, wide=True)
    conv_8bit.conv_8bit_kernel[conv_8bit.conv_grid(shape, config)](
        x, weight, weight_scale, bias, compensation(weight), residual, y, *SCALES.values(), 1.0, 0,
        shape.M, shape.H, shape.W, shape.P, shape.Q, **constants, EARLY=False,
    )  # fmt: skip
    expected = exact(case, tensors, relu=True, with_residual=True, **SCALES)
    assert relative_error(y, expected) < kernel_tolerance(torch.float32, weight[0].numel())


def test_nan_is_not_hidden_by_relu() -> None:
    x, weight, weight_scale, bias, _ = make(CASES[0], LEVELS, seed=6)
    bias[3] = float("nan")
    y = torch.ops.fastres.conv2d_8bit(x, weight, weight_scale, bias, None, 1.0, stride=1, padding=1, relu=True)
    assert bool(y[..., 3].isnan().all())
    assert int(y.isnan().sum()) == y[..., 3].numel()


def test_empty_batch() -> None:
    x, weight, weight_scale, bias, _ = make(CASES[0], LEVELS)
    y = torch.ops.fastres.conv2d_8bit(x[:0], weight, weight_scale, bias, None, 1.0, output_scale=1.0, padding=1)
    assert y.shape == (0, 9, 7, 64)


def test_gpus_without_8_bit_tensor_cores_are_named() -> None:
    assert [why_not_8bit(LEVELS, gpu) for gpu in (A100, L4, H100, MI300X)] == [""] * 4
    assert [why_not_8bit(E4M3, gpu) for gpu in (L4, H100)] == ["", ""]
    assert why_not_8bit(E4M3, A100) == "e4m3 needs sm_89 or later, gfx950 or gfx12, and A100 is sm_80"
    assert "MI300X is gfx942" in why_not_8bit(E4M3, MI300X)
    assert "tensor cores on sm_75" in why_not_8bit(LEVELS, T4)


def test_e4m3_on_a_gpu_without_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_8bit, "gpu_of", lambda device: A100)
    x, weight, weight_scale, bias, _ = make(CASES[0], E4M3)
    with pytest.raises(KernelError, match=r"e4m3 needs sm_89 or later.*A100 is sm_80"):
        torch.ops.fastres.conv2d_8bit(x, weight, weight_scale, bias, None, 1.0, padding=1)


def test_bad_input_is_named() -> None:
    x, weight, weight_scale, bias, residual = make(CASES[0], LEVELS)

    def op(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return torch.ops.fastres.conv2d_8bit(x, weight, weight_scale, bias, residual, 1.0, output_scale=1.0, padding=1)

    with pytest.raises(DtypeError, match="x is int8 and must be uint8, float8_e4m3fn"):
        op(x.to(torch.int8), weight, weight_scale, bias, None)
    with pytest.raises(DtypeError, match="weight is float8_e4m3fn and must be int8"):
        op(x, weight.to(E4M3), weight_scale, bias, None)
    with pytest.raises(DtypeError, match="weight_scale is float64 and must be float32"):
        op(x, weight, weight_scale.double(), bias, None)
    with pytest.raises(DtypeError, match="residual is float32 and must be uint8"):
        op(x, weight, weight_scale, bias, residual.float())
    with pytest.raises(KernelError, match=r"weight_scale is \[32\] and must be \[64\]"):
        op(x, weight, weight_scale[:32], bias, None)
    with pytest.raises(KernelError, match=r"residual is \[2, 9, 7, 32\] and must be \[2, 9, 7, 64\]"):
        op(x, weight, weight_scale, bias, residual[..., :32].contiguous())
    with pytest.raises(KernelError, match=r"x \[2, 9, 7, 64\] has strides"):
        op(x.transpose(1, 2).contiguous().transpose(1, 2), weight, weight_scale, bias, None)
    long = torch.zeros(1, 1, 1, conv_8bit.LONGEST + 1, dtype=LEVELS, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    with pytest.raises(KernelError, match="a sum of 65794 products may exceed int32; at most 65793 fit"):
        op(long, long.to(torch.int8), one, one, None)
