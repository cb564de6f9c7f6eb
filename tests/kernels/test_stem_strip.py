"""The stem in strips compared with float64, and with what the other stem kernel does with odd sizes and NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastres.kernels import stem
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.rules import STRIP, StemConfig
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from tests.measures import kernel_tolerance, relative_error

from .test_stem import DEVICE, make_input, make_weights, truth

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu

# (N, H, W, K, filter, stride, pool)
CASE = (2, 37, 45, 64, 7, 2, True)
SIZES = [(1, 32, 34), (2, 33, 33), (1, 34, 150), (1, 71, 35), (3, 9, 21), (1, 2, 3), (1, 1, 1)]


def strips(rows: int, columns: int = 32) -> StemConfig:
    return StemConfig(STRIP, columns, rows, 4, 3, prepared=True)


def run(case: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor, config: StemConfig) -> Tensor:
    packed = stem.pack_stem_weight(weight)
    scale, shift = stem.pack_normalisation(IMAGENET_MEAN, IMAGENET_STD, packed.shape[2], x.device)
    y = torch.full(truth(case, x, weight, bias).shape, float("nan"), dtype=weight.dtype, device=DEVICE)
    stem.stem_into(y, x, packed, bias, scale, shift, stride=2, padding=3, pool=True, config=config)
    return y


def check(case: tuple[int, ...], source: torch.dtype, dtype: torch.dtype, layout: str, config: StemConfig) -> None:
    x = make_input(case, source, layout, seed=6)
    weight, bias = make_weights(case, dtype, seed=6)
    tolerance = kernel_tolerance(dtype, weight[0].numel(), roundings=2, truncates=INTERPRETED)
    assert relative_error(run(case, x, weight, bias, config), truth(case, x, weight, bias)) < tolerance


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_images_of_every_dtype_and_layout(source: torch.dtype, layout: str) -> None:
    check(CASE, source, torch.float16, layout, strips(3))


def test_bfloat16() -> None:
    check(CASE, torch.uint8, torch.bfloat16, "contiguous", strips(4))


@pytest.mark.parametrize("n_h_w", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 30])
def test_every_edge(n_h_w: tuple[int, int, int], rows: int) -> None:
    """Odd and even sizes; strips of one row, strips that end inside the image, and one strip per image."""
    check((*n_h_w, 24, 7, 2, True), torch.uint8, torch.float16, "contiguous", strips(rows))


@pytest.mark.parametrize("columns", [16, 32, 64])
def test_every_width_gives_the_same_bits(columns: int) -> None:
    x = make_input(CASE, torch.uint8, "contiguous", seed=4)
    weight, bias = make_weights(CASE, torch.float16, seed=4)
    assert torch.equal(run(CASE, x, weight, bias, strips(4, columns)), run(CASE, x, weight, bias, strips(7)))


def test_negative_sums_and_biases_are_clamped_after_the_pool() -> None:
    x = make_input(CASE, torch.uint8, "contiguous", seed=5)
    weight, bias = make_weights(CASE, torch.float16, seed=5)
    y = run(CASE, x, weight, bias - 3, strips(5))
    assert 0.1 < (y == 0).double().mean() < 0.9
    assert relative_error(y, truth(CASE, x, weight, bias - 3)) < 2e-3


def test_nan_pixels_reach_the_output_and_at_most_a_row_and_a_column_more() -> None:
    x = make_input(CASE, torch.float32, "contiguous", seed=5)
    x[0, 1, 18, 22] = float("nan")
    weight, bias = make_weights(CASE, torch.float16, seed=5)
    found, expected = run(CASE, x, weight, bias, strips(4)).isnan().cpu(), truth(CASE, x, weight, bias).isnan()
    assert not found[1].any()
    assert bool(found[expected].all())
    near = expected.clone()
    near[:, :, :-1] |= expected[:, :, 1:]
    near[:, :-1] |= near[:, 1:].clone()
    assert not found[~near].any()
