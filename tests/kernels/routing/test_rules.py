"""Routing is a pure function. These tests check its choices for all layers on every known card, without a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastres.executors.gpu import conv_shape
from fastres.folding.build import outline
from fastres.kernels.conv import conv_grid
from fastres.kernels.launch import cdiv
from fastres.kernels.routing.cards import A100, CARDS, H100, INTERPRETER, L40S, T4, Gpu
from fastres.kernels.routing.rules import (
    LEAST_BLOCKS,
    STRIP,
    ConvConfig,
    ConvShape,
    reduction_blocks,
    route_conv,
    route_conv_plainly,
    route_pool,
    route_stem,
    shared_memory,
    splits,
    stem_programs,
)
from fastres.kernels.routing.without import VARIABLE, left_out
from fastres.network.architectures import ARCHITECTURES
from fastres.network.plan import Conv

DEEP = ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1)
WIDE = ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1)


def layers(model: str, batches: tuple[int, ...], size: int = 224) -> set[tuple[ConvShape, bool]]:
    """Return the distinct convolutions of a model, and whether they add a residual."""
    plan = outline(ARCHITECTURES[model], torch.float16)
    found = set()
    for batch in batches:
        shapes = plan.shapes(batch, size, size)
        found |= {(conv_shape(s, shapes[s.input]), s.residual is not None) for s in plan if isinstance(s, Conv)}
        found.add((ConvShape(batch, 1, 1, plan.head.weight.shape[1], plan.head.weight.shape[0], 1, 1, 1, 0), False))
    return found


FAMILY = set().union(*(layers(model, (1, 3, 8, 64, 256)) for model in ARCHITECTURES))


@pytest.mark.parametrize("gpu", CARDS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")]
)
def test_every_layer_gets_a_configuration_that_fits(gpu: Gpu, dtype: torch.dtype, precision: str) -> None:
    for shape, residual in FAMILY:
        config = route_conv(shape, dtype, gpu, precision, residual=residual)
        blocks = reduction_blocks(shape, config)
        assert shared_memory(config, dtype, gpu) <= gpu.shared_memory
        assert all(size & (size - 1) == 0 for size in (config.block_m, config.block_n, config.block_k))
        assert min(config.block_m, config.block_n, config.block_k) >= 16
        assert config.block_m >= 64 or config.note, "Hopper has no wgmma below 64 rows"
        if config.split > 1:
            (programs,) = conv_grid(shape, config)
            assert programs <= 2 * gpu.multiprocessors
            assert blocks - cdiv(blocks, config.split) * (config.split - 1) >= LEAST_BLOCKS
        else:  # what leaves more than half of the multiprocessors idle has nothing to split
            (programs,) = conv_grid(shape, config)
            assert 2 * programs > gpu.multiprocessors or blocks < 4 * LEAST_BLOCKS, (shape, config)


def test_bfloat16_runs_as_float16_does() -> None:
    for (shape, residual), gpu in itertools.product(layers("resnet50", (1, 64)), CARDS):
        found = [route_conv(shape, dtype, gpu, residual=residual) for dtype in (torch.float16, torch.bfloat16)]
        assert found[0] == found[1]


def test_large_batches_get_large_tiles_and_small_ones_fill_the_gpu() -> None:
    config = route_conv(replace(WIDE, C=64), torch.float16, L40S)
    assert (config.block_m, config.block_n) == (128, 128)
    small = route_conv(replace(WIDE, N=1), torch.float16, H100)
    assert small.block_m * small.block_n < 128 * 128


@pytest.mark.parametrize("gpu", CARDS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_reduction_of_one_image_is_split_on_every_gpu(gpu: Gpu, dtype: torch.dtype) -> None:
    config = route_conv(DEEP, dtype, gpu)
    assert config.split > 1
    before = route_conv_plainly(DEEP, dtype, gpu)
    assert before.split == 1
    assert conv_grid(DEEP, config)[0] > conv_grid(DEEP, before)[0]
    assert route_conv(DEEP, dtype, INTERPRETER).split == 1


def test_a_reduction_is_cut_into_parts_of_at_least_four_blocks() -> None:
    # Each part has ⌈72 / split⌉ blocks, so the last of 10 parts would have nothing to do.
    assert splits(72, 100) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 12]
    assert splits(72, 5) == [1, 2, 3, 4, 5]
    assert splits(7, 100) == splits(100, 1) == splits(100, 0) == [1]


def test_wide_tiles_for_many_channels_of_large_batches() -> None:
    def tile(gpu: Gpu, shape: ConvShape = WIDE, residual: bool = False) -> tuple[int, int]:
        config = route_conv(shape, torch.float16, gpu, residual=residual)
        return config.block_m, config.block_n

    assert tile(H100) == (128, 256)
    assert tile(A100) == tile(L40S) == (128, 128), "their products are no faster than L2 delivers data"
    assert tile(H100, residual=True) == (128, 128), "it spills"
    assert tile(H100, replace(WIDE, K=128)) == (128, 128)
    # 196 tiles on 132 multiprocessors take two waves. 392 tiles of half the width take three: a third more arithmetic.
    assert tile(H100, ConvShape(256, 7, 7, 512, 512, 3, 3, 1, 1)) == (128, 128)
    assert (route_conv_plainly(WIDE, torch.float16, H100).block_n) == 128


@pytest.mark.parametrize("gpu", [gpu for gpu in CARDS if not gpu.is_amd and gpu is not T4], ids=lambda gpu: gpu.name)
def test_two_programs_of_the_usual_tile_fit_a_multiprocessor(gpu: Gpu) -> None:
    config = route_conv(WIDE, torch.float16, gpu, residual=True)
    assert (config.block_m, config.block_n) == (128, 128)
    assert 2 * (shared_memory(config, torch.float16, gpu) + 1024) <= gpu.shared_memory + 1024
    assert config.num_stages >= 3


def test_sm_75_has_tiles_for_ordinary_units() -> None:
    config = route_conv(WIDE, torch.float16, T4)
    assert "sm_75" in config.note
    assert config == ConvConfig("conv", 64, 64, 16, 8, 2, config.note)
    assert route_stem(64, (64, 112, 112), torch.float16, T4, pool=True).block_q == 32


def test_ieee_float32_says_that_it_is_slow() -> None:
    shape = ConvShape(8, 14, 14, 256, 256, 3, 3, 1, 1)
    assert "tensor cores" in route_conv(shape, torch.float32, H100, "ieee").note
    assert route_conv(shape, torch.float32, H100, "tf32").note == ""


def test_stem_and_pool_blocks_are_powers_of_two() -> None:
    for columns in (4, 49, 112, 400):
        config = route_stem(64, (1, columns, columns), torch.float16, H100, pool=True)
        assert config.block_q in (16, 32, 64, 128)
    for pixels in (1, 20, 49, 400):
        assert route_pool(2048, pixels).block_hw in (1, 2, 4, 8, 16)


def test_the_stem_of_few_images_is_cut_into_pieces_for_every_multiprocessor() -> None:
    found = [route_stem(64, (batch, 112, 112), torch.float16, A100, pool=True) for batch in (1, 2, 8, 15)]
    assert [(config.block_q, config.rows) for config in found] == [(64, 1), (64, 2), (128, 4), (128, 4)]
    programs = [stem_programs(n, 56, 56, *(64, rows)) for n, rows in ((1, 1), (2, 2))]
    assert programs == [112, 112]
    assert all(count >= A100.multiprocessors for count in programs)


def test_strips_fill_two_programs_per_multiprocessor_with_as_few_steps_as_possible() -> None:
    found = [route_stem(64, (batch, 112, 112), torch.float16, H100, pool=True) for batch in (1, 8, 16, 64, 256)]
    assert {(config.kernel, config.block_q, config.num_warps, config.num_stages) for config in found} == {
        (STRIP, 64, 4, 3)
    }
    assert [config.rows for config in found] == [1, 4, 7, 28, 56]
    assert all(config.prepared for config in found)


def test_which_stems_run_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(
        dtype: torch.dtype = torch.float16, gpu: Gpu = H100, columns: int = 112, k: int = 64, **more: Any
    ) -> str:
        return route_stem(k, (8, columns, columns), dtype, gpu, **{"pool": True, **more}).kernel

    assert kernel() == kernel(torch.bfloat16) == kernel(columns=32) == kernel(k=16) == STRIP
    others = [kernel(torch.float32), kernel(gpu=A100), kernel(columns=31), kernel(k=128), kernel(taps=(5, 2, 2))]
    assert {*others, kernel(gpu=INTERPRETER)} == {"stem_pool"}
    assert kernel(pool=False) == "stem"
    monkeypatch.setenv(VARIABLE, STRIP)
    left_out.cache_clear()
    try:
        assert kernel() == "stem_pool"
    finally:
        left_out.cache_clear()


def test_images_are_prepared_for_larger_batches() -> None:
    def prepared(batch: int, dtype: torch.dtype = torch.float16, pool: bool = True) -> bool:
        return route_stem(64, (batch, 112, 112), dtype, A100, pool).prepared

    assert prepared(16)
    assert prepared(256, torch.bfloat16)
    assert not prepared(8)
    assert not prepared(256, torch.float32)
    assert not prepared(256, pool=False)
