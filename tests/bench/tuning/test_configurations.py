"""Test which configurations the tuner tries for a layer, and how it checks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastres.bench.tuning import configurations
from fastres.errors import DeviceError
from fastres.kernels import dispatch
from fastres.kernels.launch import INTERPRETED, cdiv
from fastres.kernels.routing.cards import A100, H100
from fastres.kernels.routing.rules import LEAST_BLOCKS, ConvConfig, ConvShape, reduction_blocks, route_conv
from fastres.kernels.routing.tables import Layer
from fastres.roofline.ceilings import Ceilings
from fastres.roofline.estimate import conv_seconds

LIMITS = Ceilings(790, 4300)


LARGE = Layer(ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1), "float16", False)


GEMM = Layer(ConvShape(256, 14, 14, 256, 1024, 1, 1, 1, 0), "float16", True)


def tools(**changes: object) -> configurations.Tools:
    """Return tools for a GPU on which smaller tiles are faster, and everything compiles and is correct."""

    def microseconds(layer: Layer, config: ConvConfig) -> float:
        return float(config.block_m * config.block_n + config.block_k)

    def compiles_well(layer: Layer, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        return list(configs)

    made = configurations.Tools(compiles_well, lambda layer, config: True, microseconds)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_layers_are_the_distinct_convolutions() -> None:
    found = configurations.layers_of(["resnet50"], [1, 8], 224, torch.float16)
    assert len(found) == len(set(found)) == 2 * 24, "the classifier is included"
    assert {layer.shape.N for layer in found} == {1, 8}
    assert Layer(ConvShape(8, 56, 56, 64, 256, 1, 1, 1, 0), "float16", True) in found


def test_candidates_include_the_rules_and_every_kernel_that_fits() -> None:
    found = configurations.candidates(GEMM, H100)
    assert found[0] == route_conv(GEMM.shape, torch.float16, H100)
    assert {config.kernel for config in found} >= {"conv", "gemm_persistent"}
    specialised = {"conv_specialized", "conv_specialized_compact"}
    assert {config.kernel for config in configurations.candidates(LARGE, H100)} >= {"conv_tma", *specialised}
    assert {config.kernel for config in configurations.candidates(LARGE, A100)} == {"conv"}
    few = replace(LARGE, shape=replace(LARGE.shape, N=8))
    assert {config.kernel for config in configurations.candidates(few, H100)} == {"conv", *specialised}


def test_small_layers_try_programs_that_share_tiles() -> None:
    one = Layer(ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), "float16", False)
    found = configurations.candidates(one, H100)
    assert {1, 2, 4, 8} < {config.split for config in found} <= {1, *configurations.SPLITS}
    for config in found:
        blocks = reduction_blocks(one.shape, config)
        assert config.split == 1 or blocks - cdiv(blocks, config.split) * (config.split - 1) >= LEAST_BLOCKS, "the last"
    assert {config.split for config in configurations.candidates(LARGE, H100)} == {1}
    tile = ConvConfig("conv", 64, 64, 64, 4, 4)
    times = [conv_seconds(one, replace(tile, split=split), H100, LIMITS) for split in (1, 2, 4, 8, 16)]
    assert times[0] > 2 * times[2]  # less than four times, because the last program reads all sums
    assert times[0] > times[1] > times[2] > times[3] < times[4], "partial sums are traffic too"
    best = min(configurations.candidates(one, H100), key=lambda config: conv_seconds(one, config, H100, LIMITS))
    assert best.split > 1
    assert (
        max(
            config.split for config in configurations.promising(one, configurations.candidates(one, H100), H100, LIMITS)
        )
        > 1
    )


def test_tiles_wider_than_the_layer_are_not_tried() -> None:
    narrow = Layer(ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1), "float16", False)
    assert max(config.block_n for config in configurations.candidates(narrow, H100)) <= 64


def test_far_off_candidates_are_dropped_and_the_rules_kept() -> None:
    configs = configurations.candidates(LARGE, H100)
    kept = configurations.promising(LARGE, configs, H100, LIMITS)
    assert kept[0] == configs[0]
    assert 5 < len(kept) < len(configs)
    # A few tiles per kind of kernel, with a few variants each, take seconds per layer instead of minutes.
    for kernel in {config.kernel for config in kept}:
        tiles = [(config.block_m, config.block_n) for config in kept[1:] if config.kernel == kernel]
        assert 1 <= len(set(tiles)) <= configurations.TILES_TRIED
        assert max(tiles.count(tile) for tile in tiles) <= configurations.VARIANTS_TRIED
    bad = ConvConfig("conv", 64, 16, 64, 4, 3)
    assert configurations.promising(LARGE, [bad, *configs], H100, LIMITS)[0] == bad, (
        "the rules' own choice is always measured"
    )


def test_the_fastest_right_one_that_compiles_wins() -> None:
    a, b, c, d = (ConvConfig("conv", m, 64, 64, 4, 3) for m in (256, 128, 64, 32))
    found = configurations.tune_layer(
        LARGE,
        [a, b, c, d],
        tools(compiles_well=lambda layer, configs: [a, b, c], is_right=lambda layer, config: config != c),
    )
    assert found.config == b
    assert (found.microseconds, found.rules_microseconds) == (128 * 64 + 64, 256 * 64 + 64)


def test_wrong_rules_are_an_error() -> None:
    with pytest.raises(DeviceError, match="The rules' own configuration"):
        configurations.tune_layer(
            LARGE, [ConvConfig("conv", 64, 64, 64, 4, 3)], tools(is_right=lambda layer, config: False)
        )


@pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    "config", [ConvConfig("conv", 64, 32, 16, 4, 2), ConvConfig("conv", 64, 32, 16, 4, 2, split=2)]
)
def test_results_are_compared_with_float32(monkeypatch: pytest.MonkeyPatch, config: ConvConfig, residual: bool) -> None:
    device = torch.device("cpu" if INTERPRETED else "cuda")
    layer = Layer(ConvShape(2, 6, 5, 16, 24, 3, 3, 2, 1, 2), "float16", residual)
    assert configurations.error(layer, config, device) < torch.finfo(torch.float16).eps
    into = dispatch.convolve_into

    def spoiled(y: torch.Tensor, *tensors: torch.Tensor, **settings: Any) -> None:
        into(y, *tensors, **settings)
        y[1, 2, 2, 7] += 1

    monkeypatch.setattr(dispatch, "convolve_into", spoiled)
    assert configurations.error(layer, config, device) > 2 * torch.finfo(torch.float16).eps
    monkeypatch.setattr(dispatch, "convolve_into", lambda *_tensors, **_settings: None)
    assert not configurations.error(layer, config, device) < 1, "a result that was not written is wrong"
