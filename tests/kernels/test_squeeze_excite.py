"""Squeeze-and-excitation compared with float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastres.errors import KernelError
from fastres.kernels import conv, head, reference, squeeze_excite
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import gpu_of
from fastres.kernels.routing.rules import ConvConfig
from tests.measures import kernel_tolerance, relative_error

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def arguments(shape: tuple[int, ...], squeezed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return x, residual, and weights for which the gates of different images and channels differ."""
    generator = torch.Generator().manual_seed(0)
    c = shape[3]
    scale = torch.randn(shape[0], 1, 1, c, generator=generator)
    x = torch.randn(shape, generator=generator) + scale
    values = (
        x,
        torch.randn(shape, generator=generator),
        torch.randn(squeezed, c, generator=generator) * 3 / c**0.5,
        torch.randn(squeezed, generator=generator),
        torch.randn(c, squeezed, generator=generator) * 2 / squeezed**0.5,
        torch.randn(c, generator=generator),
    )
    return tuple(value.to(DEVICE, torch.float32 if value.ndim == 1 else dtype) for value in values)


@pytest.mark.parametrize(("shape", "squeezed"), [((2, 7, 9, 256), 16), ((3, 5, 5, 96), 8), ((1, 1, 3, 40), 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_definition(shape: tuple[int, ...], squeezed: int, dtype: torch.dtype) -> None:
    values = arguments(shape, squeezed, dtype)
    y = torch.ops.fastres.squeeze_excite(*values)
    expected = reference.squeeze_excite(*(value.double() for value in values))
    assert y.dtype == dtype
    # The means and the squeezed features are rounded. A rounding error of the gate's argument (of magnitude 3) changes
    # the gate by up to 3/4 of that error.
    tolerance = kernel_tolerance(dtype, shape[1] * shape[2] + shape[3] + squeezed, roundings=4, truncates=INTERPRETED)
    assert relative_error(y, expected) < tolerance


def test_gates_matter() -> None:
    x, residual, *weights = arguments((2, 4, 4, 64), 8, torch.float32)
    gated = torch.ops.fastres.squeeze_excite(x, residual, *weights)
    assert relative_error(gated, torch.relu(x + residual)) > 0.1
    swapped = torch.ops.fastres.squeeze_excite(x.flip(0), residual.flip(0), *weights).flip(0)
    assert torch.equal(gated, swapped)


def test_the_residual_may_be_written_over() -> None:
    x, residual, *weights = arguments((2, 5, 6, 48), 8, torch.float32)
    expected = torch.ops.fastres.squeeze_excite(x, residual, *weights)
    squeeze_excite.squeeze_excite_into(residual, x, residual, *weights)
    assert torch.equal(residual, expected)


def test_split_reductions_share_the_callers_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual, *weights = arguments((2, 5, 6, 144), 80, torch.float32)
    expected = reference.squeeze_excite(*(value.double() for value in (x, residual, *weights)))
    split = ConvConfig("conv", 16, 16, 16, 4, 2, split=4)
    for module, name in (
        (conv, "route_conv"),
        (squeeze_excite, "route_conv"),
        (squeeze_excite, "route"),
        (head, "route"),
    ):
        monkeypatch.setattr(module, name, lambda *sizes, **flags: split)
    count = squeeze_excite.squeeze_arrivals(2, 144, 80, torch.float32, gpu_of(x.device))
    assert count == 144 // 16  # the wider of the two layers
    arrived = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    made = []
    monkeypatch.setattr(Tensor, "new_zeros", lambda *sizes, **options: made.append(sizes))
    squeeze_excite.squeeze_excite_into(residual, x, residual, *weights, arrived=arrived)
    assert not made
    assert not arrived.any(), "unchanged"
    assert relative_error(residual, expected) < kernel_tolerance(torch.float32, 30 + 144 + 80, roundings=4)


def test_empty_batches_and_bad_input() -> None:
    x, residual, *weights = arguments((2, 4, 4, 64), 8, torch.float32)
    assert torch.ops.fastres.squeeze_excite(x[:0], residual[:0], *weights).shape == (0, 4, 4, 64)
    with pytest.raises(KernelError, match=r"expand_weight is \[64, 4\] and must be \[64, 8\]"):
        torch.ops.fastres.squeeze_excite(
            x, residual, weights[0], weights[1], weights[2][:, :4].contiguous(), weights[3]
        )
    with pytest.raises(KernelError, match=r"residual is \[2, 4, 2, 64\]"):
        torch.ops.fastres.squeeze_excite(x, residual[:, :, :2].contiguous(), *weights)
