"""The stem kernel compared with float64: inputs of every dtype and layout, with and without pooling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastres.errors import DtypeError, KernelError
from fastres.kernels import prepare, reference, stem
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.rules import StemConfig
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from tests.measures import kernel_tolerance, relative_error

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
    if layout == "slice":  # neither layout: every second column of a wider picture
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
    # Pixels and wider floats are rounded to the computing dtype when they are read, and all results when written.
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


PREPARED = StemConfig("stem_pool", 32, 3, 4, 1, prepared=True)


def run_prepared(case: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    packed = stem.pack_stem_weight(weight)
    scale, shift = stem.pack_normalisation(IMAGENET_MEAN, IMAGENET_STD, packed.shape[2], x.device)
    *_, r, stride, pool = case
    y = torch.full(truth(case, x, weight, bias).shape, float("nan"), dtype=weight.dtype, device=DEVICE)
    stem.stem_into(y, x, packed, bias, scale, shift, stride=stride, padding=r // 2, pool=bool(pool), config=PREPARED)
    return y


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_prepared_images_of_every_dtype_and_layout(source: torch.dtype, layout: str) -> None:
    case = CASES[0]
    x = make_input(case, source, layout, seed=6)
    weight, bias = make_weights(case, torch.float16, seed=6)
    tolerance = kernel_tolerance(torch.float16, weight[0].numel(), roundings=2, truncates=INTERPRETED)
    assert relative_error(run_prepared(case, x, weight, bias), truth(case, x, weight, bias)) < tolerance


@pytest.mark.parametrize("case", [*CASES[1:4], (1, 40, 35, 32, 5, 2, True), (1, 9, 21, 16, 3, 2, True)], ids=str)
def test_prepared_sizes(case: tuple[int, ...]) -> None:
    x = make_input(case, torch.uint8, "contiguous", seed=7)
    weight, bias = make_weights(case, torch.float32, seed=7)
    tolerance = kernel_tolerance(torch.float32, weight[0].numel(), roundings=2)
    assert relative_error(run_prepared(case, x, weight, bias), truth(case, x, weight, bias)) < tolerance


def test_what_preparing_writes() -> None:
    x = make_input(CASES[0], torch.uint8, "slice", seed=8)
    scale, shift = stem.pack_normalisation(IMAGENET_MEAN, IMAGENET_STD, 32, x.device)
    y = prepare.prepare(x, torch.float32, scale, shift, padding=3, taps=8).cpu()
    n, _, h, w = x.shape
    rows, columns = prepare.prepared_size(h, w, 3, 8)
    assert y.shape == (n, rows, columns, 4)
    assert (columns * 4) % prepare.ALIGNED == 0
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = torch.zeros(n, rows, columns, 4)
    expected[:, 3 : 3 + h, 3 : 3 + w, :3] = ((x.cpu() / 255 - mean) / std).permute(0, 2, 3, 1)
    assert torch.equal(y == 0, expected == 0)
    assert relative_error(y, expected) < 1e-6


def test_nan_in_prepared_images_reaches_the_output_and_at_most_one_column_more() -> None:
    case = CASES[0]
    x = make_input(case, torch.float32, "contiguous", seed=5)
    x[0, 1, 18, 22] = float("nan")
    weight, bias = make_weights(case, torch.float32, seed=5)
    found, expected = run_prepared(case, x, weight, bias).isnan().cpu(), truth(case, x, weight, bias).isnan()
    assert not found[1].any()
    assert bool(found[expected].all())
    left = torch.zeros_like(expected)
    left[:, :, :-1] = expected[:, :, 1:]
    assert not found[~(expected | left)].any()


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
