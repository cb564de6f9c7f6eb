"""The fused bottleneck kernel compared with float64: in the interpreter and, if there is one, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastres.errors import DeviceError, DtypeError, KernelError
from fastres.kernels import reference
from fastres.kernels.fused import CANDIDATES, check_fused, fused_grid, fused_into, why_not_fused
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
SMALL = ConvConfig("fused", 64, 64, 64, 4, 3)


@dataclass(frozen=True)
class Case:
    """Sizes of a block: 3×3 C→J, 1×1 J→K with a shortcut of U channels (0: a residual), 1×1 K→I (0: no z)."""

    N: int
    H: int
    W: int
    C: int
    J: int
    K: int
    U: int
    I: int  # noqa: E741
    stride: int = 1
    shortcut_stride: int = 1

    @property
    def pixels(self) -> tuple[int, int]:
        return (self.H - 1) // self.stride + 1, (self.W - 1) // self.stride + 1


CASES = [
    Case(66, 4, 3, 64, 64, 256, 0, 64),
    Case(64, 3, 4, 64, 64, 256, 64, 128),
    Case(64, 3, 2, 64, 64, 128, 0, 0),
    Case(70, 5, 4, 72, 128, 256, 32, 16, 2, 2),
    Case(3, 1, 1, 8, 16, 128, 0, 32),
]


@dataclass
class Tensors:
    x: Tensor
    weights: list[Tensor]  # KRSC, of the 3×3, the 1×1, the next 1×1
    biases: list[Tensor]
    residual: Tensor | None
    shortcut: Tensor | None
    projection: Tensor  # [K, 1, 1, U]

    def arguments(self) -> tuple[Tensor | None, ...]:
        """Return the arguments of ``fused_into`` after ``y``."""
        merged = merge_shortcut_weight(self.weights[1], self.projection)
        return (
            self.x, self.weights[0], self.biases[0], merged, self.biases[1], self.residual, self.shortcut,
        )  # fmt: skip


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def weight(k: int, r: int, c: int) -> Tensor:
        return (draw(k, r, r, c) / max(1, r * r * c) ** 0.5).to(DEVICE, dtype)

    p, q = case.pixels
    x, residual = draw(case.N, case.H, case.W, case.C), draw(case.N, p, q, case.K)
    stride = case.shortcut_stride
    shortcut = draw(case.N, p * stride - (stride - 1), q * stride, case.U)
    return Tensors(
        x.to(DEVICE, dtype),
        [weight(case.J, 3, case.C), weight(case.K, 1, case.J), weight(case.I, 1, case.K)],
        [draw(size).to(DEVICE) for size in (case.J, case.K, case.I)],
        None if case.U else residual.to(DEVICE, dtype),
        shortcut.to(DEVICE, dtype) if case.U else None,
        weight(case.K, 1, case.U),
    )


def truth(case: Case, t: Tensors) -> tuple[Tensor, Tensor | None]:
    """Compute the three convolutions one after the other in float64."""
    w1, w2, w3 = (weight.double() for weight in t.weights)
    if t.shortcut is None:
        assert t.residual is not None
        added = t.residual.double()
    else:
        zeros = torch.zeros_like(t.biases[1])
        added = reference.conv2d(t.shortcut.double(), t.projection.double(), zeros, stride=case.shortcut_stride)
    v = reference.conv2d(t.x.double(), w1, t.biases[0], stride=case.stride, padding=1, relu=True)
    y = reference.conv2d(v, w2, t.biases[1], added, relu=True)
    return y, reference.conv2d(y, w3, t.biases[2], relu=True) if case.I else None


def run(case: Case, t: Tensors, config: ConvConfig) -> tuple[Tensor, Tensor | None]:
    p, q = case.pixels
    y = torch.full((case.N, p, q, case.K), float("nan"), dtype=t.x.dtype, device=DEVICE)
    z = torch.full((case.N, p, q, case.I), float("nan"), dtype=t.x.dtype, device=DEVICE) if case.I else None
    options = {
        "stride": case.stride,
        "shortcut_stride": case.shortcut_stride,
        "z": z,
        "weight3": t.weights[2].flatten(1) if case.I else None,
        "bias3": t.biases[2] if case.I else None,
    }
    check_fused(y, *t.arguments(), **options)
    fused_into(y, *t.arguments(), **options, config=config)
    return y, z


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, dtype: torch.dtype) -> None:
    t = make(case, dtype)
    y, z = run(case, t, SMALL)
    expected_y, expected_z = truth(case, t)
    reduction = 9 * case.C + case.J + case.U
    assert relative_error(y, expected_y) < kernel_tolerance(dtype, reduction, roundings=2, truncates=INTERPRETED)
    if z is not None and expected_z is not None:
        tolerance = kernel_tolerance(dtype, reduction + case.K, roundings=3, truncates=INTERPRETED)
        assert relative_error(z, expected_z) < tolerance


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate(config: ConvConfig) -> None:
    case = Case(130, 2, 3, 64, 64, 256, 0, 64)
    t = make(case, torch.float16, seed=1)
    y, z = run(case, t, config)
    expected_y, expected_z = truth(case, t)
    assert z is not None
    assert expected_z is not None
    assert relative_error(y, expected_y) < kernel_tolerance(torch.float16, 640, roundings=2)
    assert relative_error(z, expected_z) < kernel_tolerance(torch.float16, 896, roundings=3)


def test_output_may_be_the_residual() -> None:
    case = CASES[0]
    t = make(case, torch.float16, seed=2)
    expected, _ = truth(case, t)
    assert t.residual is not None
    fused_into(t.residual, *t.arguments(), config=SMALL)
    assert relative_error(t.residual, expected) < kernel_tolerance(torch.float16, 640, roundings=2)


def test_nan_reaches_both_outputs() -> None:
    case = Case(64, 5, 4, 64, 64, 128, 0, 16)
    t = make(case, torch.float16, seed=3)
    t.x[7, 4, 0, 10] = float("nan")
    y, z = run(case, t, SMALL)
    assert z is not None
    for output in (y, z):
        assert bool(output[7, 3:, :2].isnan().all())
        assert int(output.isnan().sum()) == 4 * output.shape[3]


def test_grid() -> None:
    assert fused_grid(ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1), CANDIDATES[0]) == (2 * 56 * 56,)
    assert fused_grid(ConvShape(65, 56, 55, 64, 64, 3, 3, 2, 1), SMALL) == (2 * 28 * 28,)


def test_what_the_kernel_takes() -> None:
    shape = ConvShape(64, 56, 56, 64, 64, 3, 3, 1, 1)
    assert why_not_fused(shape, 256, torch.float16, H100, next_channels=64) == ""
    assert "sm_80" in why_not_fused(shape, 256, torch.float16, A100)
    assert "not 256" in why_not_fused(replace(shape, K=256), 1024, torch.float16, H100)
    assert "not 96" in why_not_fused(shape, 256, torch.float16, H100, shortcut_channels=96)
    assert "not 8" in why_not_fused(shape, 256, torch.float16, H100, next_channels=8)
    assert "192 output channels" in why_not_fused(shape, 192, torch.float16, H100)
    assert "not 63" in why_not_fused(replace(shape, N=63), 256, torch.float16, H100)
    assert "groups" in why_not_fused(replace(shape, groups=2), 256, torch.float16, H100)
    assert "must be smaller than" in why_not_fused(replace(shape, padding=3), 256, torch.float16, H100)


def test_bad_input_is_named() -> None:
    case = CASES[0]
    t = make(case, torch.float16)
    p, q = case.pixels
    y = torch.empty(case.N, p, q, case.K, dtype=torch.float16, device=DEVICE)
    x, w1, b1, w2, b2, residual, _ = t.arguments()
    assert residual is not None
    assert x is not None
    with pytest.raises(KernelError, match="either a residual or a shortcut; neither was given"):
        check_fused(y, x, w1, b1, w2, b2)
    with pytest.raises(KernelError, match="either a residual or a shortcut; both were given"):
        check_fused(y, x, w1, b1, w2, b2, residual, residual)
    with pytest.raises(KernelError, match="go together"):
        check_fused(y, x, w1, b1, w2, b2, residual, z=y)
    with pytest.raises(KernelError, match=r"weight2 is \[256, 64\] and must be \[256, 128\]"):
        check_fused(y, x, w1, b1, w2, b2, None, x)
    with pytest.raises(KernelError, match=r"bias1 is \[256\] and must be \[64\]"):
        check_fused(y, x, w1, b2, w2, b2, residual)
    with pytest.raises(DtypeError, match="weight1 is bfloat16 and must be float16"):
        check_fused(y, x, w1.bfloat16(), b1, w2, b2, residual)
    with pytest.raises(DeviceError, match="given tensors on meta"):
        check_fused(y, x.to("meta"), w1, b1, w2, b2, residual)
