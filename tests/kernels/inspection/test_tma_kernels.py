"""Ahead-of-time compilation of the TMA kernels for sm_90: they fit, do not spill, and multiply from shared memory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from fastres.errors import KernelError
from fastres.executors.compilations import tma_compilations
from fastres.kernels import conv_specialized, conv_tma, fused, gemm
from fastres.kernels.inspection import tma_kernels
from fastres.kernels.inspection.ahead_of_time import compile_for
from fastres.kernels.inspection.tma_kernels import (
    TmaReport,
    compile_conv_tma,
    compile_fused,
    compile_gemm,
    compile_tma,
    inspect_tma,
    inspect_tma_all,
    rows,
)
from fastres.kernels.routing.cards import H100
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.tma import programs_per_multiprocessor, tma_fits, tma_shared_memory

SHAPE_1X1 = ConvShape(256, 14, 14, 256, 1024, 1, 1, 1, 0)
SHAPE_3X3 = ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1)


def deepest(configs: Iterable[ConvConfig]) -> list[ConvConfig]:
    """Of the configurations that differ only in their number of stages, return the deepest, which needs the most."""
    found: dict[object, ConvConfig] = {}
    for config in sorted(configs, key=lambda config: config.num_stages):
        found[replace(config, num_stages=0)] = config
    return list(found.values())


def faults(reports: list[TmaReport]) -> list[TmaReport]:
    return [report for report in reports if not report.good]


@pytest.mark.parametrize("config", [gemm.CANDIDATES[0], gemm.CANDIDATES[-1]], ids=lambda config: config.kernel)
def test_gemm_with_a_merged_shortcut_keeps_one_pipeline(config: ConvConfig) -> None:
    plain, merged = (
        inspect_tma(compile_gemm(256, 1024, torch.bfloat16, config, residual=False, relu=True, shortcut_channels=u))
        for u in (0, 512)
    )
    assert faults([plain, merged]) == []
    assert (merged.ptx.products, merged.ptx.loads) == (plain.ptx.products, plain.ptx.loads)


@pytest.mark.parametrize("config", [conv_tma.CANDIDATES[0], conv_tma.CANDIDATES[-1]], ids=lambda config: config.kernel)
def test_conv_with_a_strided_shortcut(config: ConvConfig) -> None:
    shape = ConvShape(256, 14, 14, 256, 1024, 1, 1, 1, 0)
    item = compile_conv_tma(
        shape, torch.float16, config, residual=False, relu=True, shortcut_channels=512, shortcut_stride=2
    )
    assert faults([inspect_tma(item)]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("stride", "residual"), [(1, True), (2, False)])
def test_every_specialised_candidate_compiles_well(stride: int, residual: bool) -> None:
    """In layer3's 3×3 convolutions one program fills a multiprocessor's registers, and each product has 64 rows."""
    shape = ConvShape(256, 28 // (3 - stride), 28 // (3 - stride), 256, 256, 3, 3, stride, 1)
    configs = deepest(config for config in conv_specialized.CANDIDATES if config.kernel.endswith("compact") == residual)
    assert len(configs) == 5
    items = [compile_tma(shape, torch.bfloat16, config, residual=residual, relu=True) for config in configs]
    reports = inspect_tma_all(items, workers=1, progress=False)
    assert faults(reports) == []
    for config, tma in zip(configs, reports, strict=True):
        assert tma.report.spills == 0
        assert tma.report.registers * 32 * (config.num_warps + 4) <= 65_536, "the producer has its own warp group"
        assert tma.ptx.products == config.block_m // 128 * config.block_k // 16


@pytest.mark.slow
@pytest.mark.parametrize(("module", "shape"), [(gemm, SHAPE_1X1), (conv_tma, SHAPE_3X3)], ids=["gemm", "conv_tma"])
def test_every_tile_compiles_well(module: object, shape: ConvShape) -> None:
    """Tests with a residual if that fits, and then checks that the bound on shared memory holds and is close.

    The kernels are persistent, which takes more registers and shared memory; the largest have one tile per program.
    """
    configs = deepest(
        config
        for config in (gemm.CANDIDATES if module is gemm else conv_tma.CANDIDATES)
        if config.kernel.endswith("_persistent") or config.block_m * config.block_n >= 128 * 256
    )
    assert len(configs) == 9 + 2
    residuals = [tma_fits(config, H100, residual=True) for config in configs]
    items = [
        compile_tma(shape, torch.float16, config, residual=residual, relu=True)
        for config, residual in zip(configs, residuals, strict=True)
    ]
    reports = inspect_tma_all(items, workers=1, progress=False)
    assert faults(reports) == []
    for config, residual, tma in zip(configs, residuals, reports, strict=True):
        bound = tma_shared_memory(config, residual=residual)
        assert bound - 2048 < tma.report.shared_memory <= bound
        if config.kernel.endswith("_persistent"):
            resident = programs_per_multiprocessor(config, residual=residual)
            assert resident * tma.report.registers * 32 * config.num_warps <= 65_536


@pytest.mark.parametrize("next_channels", [0, 64])
@pytest.mark.parametrize("shortcut_channels", [0, 64])
def test_fused_leaves_room_for_two_programs(shortcut_channels: int, next_channels: int) -> None:
    """layer1's block with the second candidate: at most 128 registers with 8 warps, and half the shared memory."""
    shape = ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1)
    channels = {"shortcut_channels": shortcut_channels, "next_channels": next_channels}
    tma = inspect_tma(compile_fused(shape, 256, torch.float16, fused.CANDIDATES[1], **channels))
    assert tma.good, tma
    assert tma.report.spills == 0
    assert tma.report.registers <= 128
    assert 2 * (tma.report.shared_memory + 1024) <= 228 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("j", "u", "next_channels"), [(64, 0, 64), (64, 64, 128), (128, 0, 128), (128, 0, 0)])
def test_every_fused_candidate_that_fits_compiles_well(j: int, u: int, next_channels: int) -> None:
    shape = ConvShape(256, 28, 28, j, j, 3, 3, 1, 1)
    channels = {"shortcut_channels": u, "next_channels": next_channels}
    configs = deepest(config for config in fused.CANDIDATES if fused.fused_fits(shape, config, H100, **channels))
    items = [compile_fused(shape, 4 * j, torch.float16, config, **channels) for config in configs]
    reports = inspect_tma_all(items, workers=1, progress=False)
    assert len(reports) >= 2
    assert faults(reports) == []
    for config, tma in zip(configs, reports, strict=True):
        assert tma.report.spills == 0
        assert tma.report.shared_memory <= fused.fused_shared_memory(shape, config, **channels)


@pytest.mark.slow
def test_layers_of_a_resnet50_compile_well() -> None:
    items = tma_compilations("resnet50", 256, torch.float16)
    labels = {item.label for item in items}
    assert {"3×3/1 64→64 56²", "3×3/2 512→512 7²", "1×1/1 512→2048 7² +res", "1×1/1 512 + 1024→2048 7²"} <= labels
    assert {item.kernel for item in items} == {"gemm", "conv_tma", "conv_specialized", "fused"}
    some = items[1::7]
    reports = inspect_tma_all(some, workers=2, progress=False)
    assert faults(reports) == []
    assert all(row[-1] == "yes" for row in rows(some, reports))


@pytest.mark.parametrize("kernel", ["gemm", "conv_tma", "conv_specialized", "fused"])
def test_relu_keeps_nan(kernel: str) -> None:
    """Checks the PTX. The interpreter's maximum always keeps NaN; a GPU's keeps it only if the kernel asks for it."""
    if kernel == "fused":
        item = compile_fused(ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1), 256, torch.float16, fused.CANDIDATES[1])
    else:
        candidates = {"gemm": gemm, "conv_tma": conv_tma, "conv_specialized": conv_specialized}[kernel].CANDIDATES
        shape = SHAPE_1X1 if kernel == "gemm" else SHAPE_3X3
        item = compile_tma(shape, torch.float16, candidates[-1], residual=False, relu=True)
    ptx = compile_for(item, tma_kernels._kernel(item.kernel), "sm_90").asm["ptx"]
    assert re.search(r"\bmax\.NaN\.", ptx)
    assert not re.search(r"\bmax\.(f32|f16|f16x2|bf16x2)\b", ptx)


@pytest.mark.parametrize("kernel", ["gemm", "conv_tma", "conv_specialized"])
def test_boxes_of_a_classifier_are_no_wider_than_tma_swizzles(kernel: str) -> None:
    """The driver refuses a descriptor with wider boxes when the kernel is launched."""
    shape = ConvShape(256, 1, 1, 2048, 1000, 1, 1, 1, 0)
    known = (*gemm.CANDIDATES, *conv_tma.CANDIDATES, *conv_specialized.CANDIDATES)
    config = next(c for c in known if (c.kernel, c.block_m, c.block_n) == (kernel, 128, 64))
    settings = {"residual": False, "relu": False}
    if kernel == "conv_specialized":
        with pytest.raises(KernelError, match="conv_specialized writes float16, not float32"):
            compile_tma(shape, torch.float16, config, **settings, out=torch.float32)
    out = torch.float16 if kernel == "conv_specialized" else torch.float32
    item = compile_tma(shape, torch.float16, config, **settings, out=out)
    described = compile_for(item, tma_kernels._kernel(kernel), "sm_90").metadata.tensordesc_meta
    assert [found["elem_size"] for found in described] == [2, 2, out.itemsize]
    for found in described:
        swizzled = {1: 32, 2: 64, 3: 128}[found["swizzle"]]
        assert found["block_size"][-1] * found["elem_size"] <= swizzled


def test_a_tile_that_is_too_large_is_reported() -> None:
    """The checks above can fail: this configuration spills and does not fit."""
    config = ConvConfig("gemm_persistent", 256, 256, 64, 8, 3)
    report = inspect_tma(compile_gemm(256, 1024, torch.float16, config, residual=True, relu=True))
    assert report.report.loop_spills > 0
    assert not report.report.fits
    assert not report.good
    assert not tma_fits(config, H100, residual=True)
