"""Histograms: every value is counted once, in any order, and the scales that the methods find in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastres.network.quantisation import LARGEST, Scale
from fastres.quantisation.histogram import BINS, Histogram
from fastres.quantisation.image_histograms import ImageHistograms
from fastres.quantisation.thresholds import METHODS, scale_for, scale_of


def filled(values: Tensor, parts: int = 1, signed: bool = False) -> Histogram:
    """Return the histogram of ``values``, one image in each part."""
    histogram = Histogram(signed)
    for part in values.chunk(parts):
        histogram.add(part[None])
    return histogram


def with_outlier(signed: bool = False) -> Tensor:
    """Half-normal (or normal) values and one that is a hundred times larger."""
    values = torch.randn(100_000, dtype=torch.float32, device="cpu")
    values = values if signed else values.abs()
    values[7] = 200.0
    return values


@pytest.mark.parametrize("signed", [False, True])
def test_the_order_of_the_values_does_not_matter(signed: bool) -> None:
    values = with_outlier(signed)
    once, later = filled(values, signed=signed), filled(values.flip(0), parts=9, signed=signed)
    growing = filled(values[values.abs().argsort()], parts=50, signed=signed)
    assert once.counts.sum() == len(values)
    assert len(once.counts) == BINS
    assert (once.counts == later.counts).all()
    assert growing.limit == once.limit == 256
    assert (once.counts == growing.counts).all()
    assert (once.least, once.largest) == (float(values.min()) if signed else 0.0, 200.0)


@pytest.mark.parametrize("signed", [False, True])
def test_a_value_is_counted_in_its_bin(signed: bool) -> None:
    values = torch.tensor([0.0, 0.0, 0.3, 0.9, 2.0], dtype=torch.float32, device="cpu")
    histogram = filled(values, parts=5, signed=signed)
    counted = histogram.centres.repeat(histogram.counts)
    assert np.abs(counted - values.numpy()).max() <= histogram.width / 2
    if signed:
        histogram.add(torch.tensor([[-3.0]], dtype=torch.float32, device="cpu"))
        assert abs(histogram.centres.repeat(histogram.counts)[0] + 3) <= histogram.width / 2


@pytest.mark.parametrize("signed", [False, True])
def test_each_image_has_a_histogram_relative_to_its_own_values(signed: bool) -> None:
    images = torch.randn(6, 5_000, dtype=torch.float32, device="cpu")
    images = images if signed else images.abs()
    images[3] *= 40
    images[4] = 0  # has no relative error
    together, apart = ImageHistograms(), ImageHistograms()
    together.add(images)
    for image in range(6):
        apart.add(images[image : image + 1])
    for histograms in (together, apart):
        bins = histograms.bins()
        assert (bins.low < bins.high).all()
        assert (bins.low < 0).any() == signed
        squares = (bins.low**2 + bins.low * bins.high + bins.high**2) / 3
        np.testing.assert_allclose(bins.shares @ squares, np.ones(5), rtol=0.01)
    largest = int(np.argmax(bins.high))
    counted = bins.shares[:, largest] * images[[0, 1, 2, 3, 5]].double().square().sum(1).numpy()
    inside = (images[[0, 1, 2, 3, 5]] >= float(bins.low[largest])).sum(1).numpy()
    np.testing.assert_allclose(counted, inside, rtol=1e-9)
    assert inside.sum() > 0


def test_of_a_large_image_a_part_of_every_channel_is_counted() -> None:
    images = torch.zeros(2, 300 * 300, 4, dtype=torch.float32, device="cpu")
    images[0, :, 3] = 1
    images[1, :, 2] = 2
    histograms = ImageHistograms()
    histograms.add(images.view(2, -1))
    bins = histograms.bins()
    assert bins.low.tolist() == [1, 2]
    assert (bins.shares[0, 1], bins.shares[1, 0]) == (0, 0)
    np.testing.assert_allclose([bins.shares[0, 0], 4 * bins.shares[1, 1]], 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_value_has_scale_1(method: str) -> None:
    assert scale_of(filled(torch.zeros(100, dtype=torch.float32, device="cpu")), method) == Scale(1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.7, 1e-30, 1e-36, 1e30])
def test_a_constant_value_can_be_expressed(method: str, value: float) -> None:
    scale = scale_of(filled(torch.full((100,), value, dtype=torch.float32, device="cpu")), method)
    assert scale.zero_point == 0
    assert scale.range[1] == pytest.approx(value, rel=0.01)


def test_the_largest_value_is_covered_by_max_and_clipped_by_the_others() -> None:
    histogram = filled(with_outlier())
    assert scale_of(histogram, "max").range[1] == pytest.approx(200, rel=1e-6)
    ranges = {method: scale_of(histogram, method).range[1] for method in METHODS if method != "max"}
    assert ranges["percentile"] == pytest.approx(3.9, abs=0.3)  # of |normal|, 0.01 % is above 3.89
    assert ranges["percentile-99.9"] == pytest.approx(3.3, abs=0.2)
    assert ranges["entropy"] < 50


def test_mse_finds_the_range_with_the_least_error() -> None:
    values = torch.randn(1_000_000, dtype=torch.float32, device="cpu").abs()
    values[0] = 12.0
    histogram = filled(values)

    def error(scale: Scale) -> float:
        levels = (values / scale.scale).round().clamp(0, LARGEST)
        return float((levels * scale.scale - values).square().sum())

    found = error(scale_of(histogram, "mse"))
    largest = float(values.max())
    assert found <= 1.01 * min(error(scale_for(0, largest * share / 100)) for share in range(2, 101))
    assert found < 0.8 * error(scale_of(histogram, "max"))


@pytest.mark.parametrize("signed", [False, True])
def test_mse_gives_levels_to_the_image_with_large_values_and_nrmse_to_the_others(signed: bool) -> None:
    images = torch.randn(64, 10_000, dtype=torch.float32, device="cpu")
    images = images if signed else images.abs()
    images[9] *= 30
    histogram = Histogram(signed)
    histogram.add(images)

    def errors(scale: Scale) -> Tensor:
        """Return the means of the images' squared errors, squared relative errors, and relative errors."""
        levels = (images / scale.scale).round().clamp(-scale.zero_point, LARGEST - scale.zero_point)
        squares = (levels * scale.scale - images).square().sum(1)
        relative = squares / images.square().sum(1)
        return torch.stack([squares.mean(), relative.mean(), relative.sqrt().mean()])

    least = -float(images.max()) if signed else 0.0
    tried = torch.stack([errors(scale_for(least / 1.1**k, float(images.max()) / 1.1**k)) for k in range(50)])
    found = [errors(scale_of(histogram, method)) for method in ("mse", "nmse", "nrmse")]
    for index in range(3):
        assert found[index][index] <= 1.02 * tried[:, index].min()
    assert found[2][2] < 0.9 * found[1][2] < 0.7 * found[0][2]


@pytest.mark.parametrize("method", ["nmse", "nrmse"])
def test_a_value_that_is_nearly_always_0_can_be_expressed(method: str) -> None:
    histogram = Histogram(False)
    values = torch.zeros(1, 300_000, dtype=torch.float32, device="cpu")
    values[0, 1] = 3.0  # not among the values of a large image that are counted
    histogram.add(values)
    assert scale_of(histogram, method).range[1] == pytest.approx(3)


@pytest.mark.parametrize("method", METHODS)
def test_a_signed_value_gets_a_zero_point(method: str) -> None:
    values = torch.rand(20_000, dtype=torch.float32, device="cpu") * 4 - 1
    scale = scale_of(filled(values, signed=True), method)
    least, largest = scale.range
    assert least == pytest.approx(-1, abs=0.1)
    assert 1 < largest <= 3.05
    if method != "entropy":
        assert largest == pytest.approx(3, abs=0.1)
