"""The stem kernel against its meaning in float64: inputs of every dtype and layout, with and without pooling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastres.errors import DtypeError, KernelError
from fastres.folding import IMAGENET_MEAN, IMAGENET_STD
from fastres.kernels import reference, stem
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing import StemConfig

from ..measures import kernel_tolerance, relative_error

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (N, H, W, K, filter, stride, pool): ImageNet stems wider than one block and of odd sizes, and CIFAR stems.
CASES = [
    (2, 37, 45, 64, 7, 2, True),
    (1, 32, 33, 64, 7, 2, True),
    (1, 34, 300, 64, 7, 2, True),
    (1, 71, 35, 64, 7, 2, True),
    (2, 11, 19, 16, 3, 1, False),
    (1, 9, 150, 24, 3, 1, False),
]


def make_input(case: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0) -> Tensor:
    n, h, w = case[:3]
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        x = torch.randint(0, 256, (n, 3, h, w), generator=generator, dtype=torch.uint8)
    else:
        x = torch.randn(n, 3, h, w, generator=generator).to(dtype)
    x = x.to(DEVICE)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "slice":  # neither: every second column of a wider picture
        wide = torch.zeros(n, 3, h, 2 * w, dtype=x.dtype, device=DEVICE)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def make_weights(case: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    k, r = case[3:5]
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(k, r, r, 3, generator=generator) / (r * r * 3) ** 0.5
    return weight.to(DEVICE, dtype), torch.randn(k, generator=generator).to(DEVICE)


def run(case: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    packed = stem.pack_stem_weight(weight)
    scale, shift = stem.pack_normalisation(IMAGENET_MEAN, IMAGENET_STD, packed.shape[2], x.device)
    *_, r, stride, pool = case
    return torch.ops.fastres.stem(x, packed, bias, scale, shift, stride, r // 2, bool(pool))


def truth(case: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    *_, r, stride, pool = case
    x = x.cpu() if x.dtype == torch.uint8 else x.cpu().double()
    return reference.stem(
        x,
        weight.double().cpu(),
        bias.cpu(),
        IMAGENET_MEAN,
        IMAGENET_STD,
        stride=stride,
        padding=r // 2,
        pool=bool(pool),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_dtypes_and_layouts(dtype: torch.dtype, source: torch.dtype, layout: str) -> None:
    case = CASES[0]
    x = make_input(case, source, layout)
    weight, bias = make_weights(case, dtype)
    y = run(case, x, weight, bias)
    expected = truth(case, x, weight, bias)
    assert y.shape == expected.shape
    # Pixels and wider floats are rounded to the computing dtype on the way in, all results on the way out.
    tolerance = kernel_tolerance(dtype, weight[0].numel(), roundings=2, truncates=INTERPRETED)
    assert relative_error(y, expected) < tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case: tuple[int, ...]) -> None:
    x = make_input(case, torch.uint8, "contiguous", seed=2)
    weight, bias = make_weights(case, torch.float32, seed=2)
    y = run(case, x, weight, bias)
    expected = truth(case, x, weight, bias)
    assert y.shape == expected.shape
    assert relative_error(y, expected) < kernel_tolerance(torch.float32, weight[0].numel(), roundings=2)


def test_pixels_are_normalised_per_channel() -> None:
    """Swapping two channels' pixels must not give the same result."""
    case = CASES[4]
    x = make_input(case, torch.uint8, "contiguous", seed=3)
    weight, bias = make_weights(case, torch.float32, seed=3)
    right, swapped = run(case, x, weight, bias), run(case, x[:, [1, 0, 2]], weight[..., [1, 0, 2]].contiguous(), bias)
    assert relative_error(swapped, right) > 0.01


@pytest.mark.parametrize("config", [StemConfig("stem_pool", q, rows, 4, 1) for q, rows in ((16, 1), (32, 3), (128, 8))])
def test_every_block_size(config: StemConfig) -> None:
    case = CASES[0]
    x = make_input(case, torch.float32, "contiguous", seed=4)
    weight, bias = make_weights(case, torch.float32, seed=4)
    packed = stem.pack_stem_weight(weight)
    scale, shift = stem.pack_normalisation(IMAGENET_MEAN, IMAGENET_STD, packed.shape[2], x.device)
    expected = truth(case, x, weight, bias)
    y = torch.full(expected.shape, float("nan"), device=DEVICE)
    stem.stem_into(y, x, packed, bias, scale, shift, stride=2, padding=3, pool=True, config=config)
    assert relative_error(y, expected) < kernel_tolerance(torch.float32, weight[0].numel())


def test_nan_pixels_reach_the_output() -> None:
    case = CASES[0]
    x = make_input(case, torch.float32, "contiguous", seed=5)
    x[0, 1, 18, 22] = float("nan")
    weight, bias = make_weights(case, torch.float32, seed=5)
    y = run(case, x, weight, bias)
    expected = truth(case, x, weight, bias)
    assert torch.equal(y.isnan().cpu(), expected.isnan())
    assert bool(y[1].isfinite().all())


def test_bad_input_is_named() -> None:
    case = CASES[0]
    x = make_input(case, torch.float32, "contiguous")
    weight, bias = make_weights(case, torch.float32)
    with pytest.raises(DtypeError, match="x is int64 and must be uint8, float32"):
        run(case, x.long(), weight, bias)
    with pytest.raises(KernelError, match="must have 3 channels"):
        run(case, x[:, :1], weight, bias)
    with pytest.raises(KernelError, match=r"bias is \[32\] and must be \[64\]"):
        run(case, x, weight, bias[:32].contiguous())
