"""The kernels in 8 bit compile without a GPU: products of 8-bit numbers on tensor cores, no spills, and they fit."""

from __future__ import annotations

import re

import pytest
import torch

from fastres.folding.build import outline
from fastres.kernels.conv_8bit import E4M3, LEVELS, conv_8bit_kernel
from fastres.kernels.inspection.ahead_of_time import Compilation, compile_for
from fastres.kernels.inspection.kernels_8bit import (
    compile_prepare_8bit,
    compile_stem_8bit,
    layers_8bit,
)
from fastres.kernels.inspection.pointer_kernels import inspect_all, table
from fastres.kernels.routing.cards import KNOWN_GPUS, Gpu
from fastres.kernels.stem_8bit import stem_8bit_kernel, stem_config
from fastres.network.architectures import ARCHITECTURES
from fastres.network.plan import Conv
from fastres.roofline.gpu_shapes import conv_shape

from .test_pointer_kernels import one_of_a_kind

PRODUCTS = {
    ("sm_80", LEVELS): r"mma\.sync\S*m16n8k32\S*\.s32\.s8\.s8\.s32",
    ("sm_89", LEVELS): r"mma\.sync\S*m16n8k32\S*\.s32\.s8\.s8\.s32",
    ("sm_89", E4M3): r"mma\.sync\S*m16n8k32\S*\.f32\.e4m3\.e4m3\.f32",
    ("sm_90", LEVELS): r"wgmma\.mma_async\S*k32\.s32\.s8\.s8",
    ("sm_90", E4M3): r"wgmma\.mma_async\S*k32\.f32\.e4m3\.e4m3",
    ("gfx942", LEVELS): r"v_mfma_i32_32x32x16_i8|v_mfma_i32_16x16x32_i8",
}
ON = [pytest.param(arch, dtype, id=f"{arch} {dtype}") for arch, dtype in PRODUCTS]


def resnet50(dtype: torch.dtype, gpu: Gpu, batch: int) -> list[Compilation]:
    plan = outline(ARCHITECTURES["resnet50"], torch.float16)
    shapes = plan.shapes(batch, 224, 224)
    convs = [step for step in plan if isinstance(step, Conv)]
    layers = [(conv_shape(step, shapes[step.input]), step.residual is not None, step.relu) for step in convs]
    return one_of_a_kind(layers_8bit(layers, dtype, gpu))


def stems(dtype: torch.dtype, gpu: Gpu) -> list[Compilation]:
    imagenet = [stem_config(56, 56, batch, gpu) for batch in (1, 256)]
    items = [compile_stem_8bit((64, 7, 7, 3), dtype, config, stride=2, pool=True) for config in imagenet]
    items.append(compile_stem_8bit((16, 3, 3, 3), dtype, stem_config(32, 32, 64, gpu), stride=1, pool=False))
    return items + [compile_prepare_8bit(dtype, source, padding=3) for source in (torch.uint8, torch.float16)]


def code(item: Compilation, gpu: Gpu) -> str:
    kernel = {"conv_8bit": conv_8bit_kernel, "stem_8bit": stem_8bit_kernel}[item.kernel]
    asm = compile_for(item, kernel, gpu.arch).asm
    text: str = asm["amdgcn" if gpu.is_amd else "ptx"]
    return text


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), ON)
def test_resnet50_compiles_well(arch: str, dtype: torch.dtype) -> None:
    gpu = KNOWN_GPUS[arch]
    items = list(dict.fromkeys([*resnet50(dtype, gpu, 256), *resnet50(dtype, gpu, 1), *stems(dtype, gpu)]))
    reports = inspect_all(items, gpu, workers=1, progress=False)
    assert not [report for report in reports if report.problems or report.spills], table(reports)
    for item, report in zip(items, reports, strict=True):
        if item.uses_dot:
            assert re.search(PRODUCTS[arch, dtype], code(item, gpu)), item.label
            assert bool(report.wgmma) == (arch == "sm_90"), item.label
            if arch == "sm_90":
                assert report.wgmma == report.mma, item.label
