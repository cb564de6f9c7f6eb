"""Routing is a pure function: what it gives for the family's layers, on three GPUs, with no GPU."""

from __future__ import annotations

import pytest
import torch

from fastres.architectures import ARCHITECTURES
from fastres.folding import outline
from fastres.gpu import conv_shape
from fastres.kernels.cards import A100, H100, MI300X, Gpu
from fastres.kernels.routing import ConvShape, route_conv, route_pool, route_stem, stem_programs
from fastres.plan import Conv


def layers(model: str, batch: int, size: int = 224) -> list[ConvShape]:
    plan = outline(ARCHITECTURES[model], torch.float16)
    shapes = plan.shapes(batch, size, size)
    return [conv_shape(step, shapes[step.input]) for step in plan if isinstance(step, Conv)]


@pytest.mark.parametrize("gpu", [A100, H100, MI300X], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model", list(ARCHITECTURES))
def test_every_layer_gets_a_configuration_that_fits(model: str, dtype: torch.dtype, gpu: Gpu) -> None:
    for batch in (1, 3, 64):
        for shape in layers(model, batch):
            config = route_conv(shape, dtype, gpu)
            tile = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
            assert tile * (config.num_stages - gpu.is_amd) <= gpu.shared_memory
            assert all(size & (size - 1) == 0 for size in (config.block_m, config.block_n, config.block_k))
            assert min(config.block_m, config.block_n, config.block_k) >= 16
            assert config.block_m >= 64 or dtype == torch.float32, "Hopper has no wgmma below 64 rows"


def test_large_batches_get_large_tiles_and_small_ones_fill_the_gpu() -> None:
    large = ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1)
    small = ConvShape(1, 14, 14, 256, 256, 3, 3, 1, 1)
    assert (route_conv(large, torch.float16, H100).block_m, route_conv(large, torch.float16, H100).block_n) == (
        128,
        128,
    )
    config = route_conv(small, torch.float16, H100)
    assert config.block_m * config.block_n < 128 * 128


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
    found = [route_stem(64, (batch, 112, 112), torch.float16, H100, pool=True) for batch in (1, 2, 8, 15)]
    assert [(config.block_q, config.rows) for config in found] == [(64, 1), (64, 1), (128, 2), (128, 4)]
    programs = [stem_programs(n, 56, 56, *(64, 1)) for n in (1, 2)]
    assert programs == [112, 224]


def test_images_are_prepared_for_larger_batches() -> None:
    def prepared(batch: int, dtype: torch.dtype = torch.float16, pool: bool = True) -> bool:
        return route_stem(64, (batch, 112, 112), dtype, H100, pool).prepared

    assert prepared(16)
    assert prepared(256, torch.bfloat16)
    assert not prepared(8)
    assert not prepared(256, torch.float32)
    assert not prepared(256, pool=False)
