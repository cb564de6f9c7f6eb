"""Test estimated times against numbers calculated by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastres.kernels.routing.cards import H100
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.routing.tables import Layer
from fastres.roofline.ceilings import Ceilings
from fastres.roofline.estimate import L2_RATE, LOAD, chain_seconds, conv_seconds

LIMITS = Ceilings(790, 4300)
LARGE = Layer(ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1), "float16", False)


def test_estimates_follow_waves_and_bytes() -> None:
    tile = ConvConfig("conv", 128, 128, 64, 8, 3)
    one = conv_seconds(LARGE, tile, H100, LIMITS)
    flops = 2 * LARGE.shape.M * 256 * 9 * 256
    assert one >= flops / 790e12
    huge = replace(LARGE, shape=replace(LARGE.shape, N=2560))
    assert 8 < conv_seconds(huge, tile, H100, LIMITS) / one < 12
    # Both need one wave, so a smaller tile has less work.
    tiny = replace(LARGE, shape=replace(LARGE.shape, N=1))
    small = ConvConfig("conv", 64, 32, 64, 4, 4)
    assert conv_seconds(tiny, small, H100, LIMITS) < conv_seconds(tiny, tile, H100, LIMITS)


def test_a_programs_chain_is_worked_out_by_hand() -> None:
    """72 blocks of 64×64×64 in float16, 16 KiB each: bound by L2's bandwidth or by its latency."""
    layer = Layer(ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), "float16", False)
    tile = ConvConfig("conv", 64, 64, 64, 4, 4)
    step = max(2 * 64 * 64 * 2 / L2_RATE, LOAD / 3)
    assert chain_seconds(layer, tile, 8, H100) == pytest.approx(2 * LOAD + 72 * step)
    assert chain_seconds(layer, replace(tile, num_stages=2), 8, H100) == pytest.approx(2 * LOAD + 72 * LOAD)
    # With a split of eight, the last program waits for the counter and reads the sums of all others.
    shared = chain_seconds(layer, replace(tile, split=8), 64, H100)
    assert shared == pytest.approx(3 * LOAD + 9 * step + 4 * 9 * 64 * 64 / L2_RATE)
    # At most four programs of four warps run at once, so some of ten wait for others.
    assert chain_seconds(layer, tile, 10 * 132, H100) > 2 * chain_seconds(layer, tile, 132, H100)
    # A persistent program fills its pipeline only once.
    persistent = ConvConfig("conv_tma_persistent", 64, 64, 64, 4, 4)
    assert chain_seconds(layer, persistent, 1320, H100) < chain_seconds(layer, tile, 1320, H100)


def test_activations_that_the_cache_holds_are_no_traffic() -> None:
    tile, limits = ConvConfig("conv", 128, 64, 64, 4, 4), Ceilings(1e6, 100.0)
    layer = Layer(ConvShape(8, 56, 56, 64, 64, 1, 1, 1, 0), "float16", False)
    weights, activations = 64 * 64 * 2, 2 * 8 * 56 * 56 * 64 * 2
    without = conv_seconds(layer, tile, replace(H100, l2_cache=0), limits)
    assert without == pytest.approx((weights + activations) / 100e9)
    assert conv_seconds(layer, tile, H100, limits) < without / 2
