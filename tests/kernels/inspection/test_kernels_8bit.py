"""The kernels in 8 bit compile without a GPU: products of 8-bit numbers on tensor cores, no spills, and they fit."""

from __future__ import annotations

import re

import pytest
import torch
from triton.compiler.errors import CompilationError

from fastres.executors.compilations import plan_compilations_8bit
from fastres.folding.build import outline
from fastres.kernels.conv_8bit import E4M3, LEVELS, conv_8bit_kernel, default_config, why_not_8bit
from fastres.kernels.inspection.__main__ import main
from fastres.kernels.inspection.ahead_of_time import Compilation, compile_for
from fastres.kernels.inspection.kernels_8bit import (
    compile_conv_8bit,
    compile_prepare_8bit,
    compile_stem_8bit,
)
from fastres.kernels.inspection.pointer_kernels import inspect, inspect_all, table
from fastres.kernels.inspection.ptx import read_ptx
from fastres.kernels.routing.cards import A100, H100, KNOWN_GPUS, MI300X, Gpu
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.stem_8bit import stem_8bit_kernel, stem_config
from fastres.network.architectures import ARCHITECTURES

from .test_pointer_kernels import one_of_a_kind

PRODUCTS = {
    ("sm_80", LEVELS): r"mma\.sync\S*m16n8k32\S*\.s32\.s8\.s8\.s32",
    ("sm_89", LEVELS): r"mma\.sync\S*m16n8k32\S*\.s32\.s8\.s8\.s32",
    ("sm_89", E4M3): r"mma\.sync\S*m16n8k32\S*\.f32\.e4m3\.e4m3\.f32",
    ("sm_90", LEVELS): r"wgmma\.mma_async\S*k32\.s32\.s8\.s8",
    ("sm_90", E4M3): r"wgmma\.mma_async\S*k32\.f32\.e4m3\.e4m3",
    ("gfx942", LEVELS): r"v_mfma_i32_32x32x16_i8|v_mfma_i32_16x16x32_i8",
}


def layers(dtype: torch.dtype, gpu: Gpu, *shapes: tuple[ConvShape, bool]) -> list[Compilation]:
    """Compilations of convolutions with ReLU, and with a residual where there is a True."""
    return [
        compile_conv_8bit(shape, dtype, default_config(shape, dtype, gpu, residual=added), residual=added, relu=True)
        for shape, added in shapes
    ]


def stem_of(dtype: torch.dtype, gpu: Gpu, batch: int) -> Compilation:
    return compile_stem_8bit((64, 7, 7, 3), dtype, stem_config(56, 56, batch, gpu), stride=2, pool=True)


def small_stem_of(dtype: torch.dtype, gpu: Gpu) -> Compilation:
    return compile_stem_8bit((16, 3, 3, 3), dtype, stem_config(32, 32, 64, gpu), stride=1, pool=False)


def code(item: Compilation, gpu: Gpu) -> str:
    asm = compile_for(item, {"conv_8bit": conv_8bit_kernel, "stem_8bit": stem_8bit_kernel}[item.kernel], gpu.arch).asm
    text: str = asm["amdgcn" if gpu.is_amd else "ptx"]
    return text


def assert_compiles_well(items: list[Compilation], dtype: torch.dtype, gpu: Gpu) -> None:
    reports = inspect_all(items, gpu, workers=1, progress=False)
    assert not [report for report in reports if report.problems or report.spills], table(reports)
    for item, report in zip(items, reports, strict=True):
        if item.uses_dot:
            text = code(item, gpu)
            assert re.search(PRODUCTS[gpu.arch, dtype], text), item.label
            products = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\S*|\bv_(?:s?mfma|wmma)\w+", text)
            assert all(re.search(PRODUCTS[gpu.arch, dtype], product) for product in products), item.label
            if gpu.arch == "sm_90":
                assert report.wgmma == report.mma, item.label


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [LEVELS, E4M3], ids=str)
def test_resnet50_compiles_well_for_hopper(dtype: torch.dtype) -> None:
    """Also the tiles of a single image, and groups as ResNeXt has them."""
    plan = outline(ARCHITECTURES["resnet50"], torch.float16)
    batches = [one_of_a_kind(plan_compilations_8bit(plan, H100, batch=batch, dtype=dtype)) for batch in (256, 1)]
    items = layers(dtype, H100, (ConvShape(64, 14, 14, 32, 32, 3, 3, 1, 1, groups=16), False))
    items += dict.fromkeys([*batches[0], *batches[1], small_stem_of(dtype, H100)])
    assert len(items) >= 16
    assert {item.kernel for item in items} == {"conv_8bit", "stem_8bit", "prepare_8bit"}
    assert_compiles_well(items, dtype, H100)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), [p for p in PRODUCTS if p[0] != "sm_90"], ids=str)
def test_layers_compile_well_elsewhere(arch: str, dtype: torch.dtype) -> None:
    gpu = KNOWN_GPUS[arch]
    items = layers(
        dtype, gpu, (ConvShape(256, 28, 28, 128, 128, 3, 3, 1, 1), False),
        (ConvShape(256, 14, 14, 256, 1024, 1, 1, 1, 0), True), (ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), False),
    )  # fmt: skip
    items += [stem_of(dtype, gpu, 256), small_stem_of(dtype, gpu)]
    assert_compiles_well([*items, compile_prepare_8bit(dtype, torch.uint8, padding=3)], dtype, gpu)


def test_gpus_that_the_kernels_refuse() -> None:
    """Triton has no e4m3 on sm_80, and multiplies it in 16 bits on gfx942."""
    shape, config = ConvShape(1, 8, 8, 64, 64, 1, 1, 1, 0), ConvConfig("conv_8bit", 64, 64, 64, 4, 2)
    item = compile_conv_8bit(shape, E4M3, config, residual=False, relu=True)
    with pytest.raises(CompilationError, match="fp8e4nv not supported"):
        inspect(item, A100)
    assert "_f16" in "".join(re.findall(r"v_mfma\w+", code(item, MI300X)))
    assert why_not_8bit(E4M3, A100)
    assert why_not_8bit(E4M3, MI300X)


def test_a_tile_that_is_too_large_is_reported() -> None:
    """The checks above can fail: with a residual, this configuration needs too many registers."""
    shape, config = ConvShape(64, 14, 14, 256, 256, 3, 3, 1, 1), ConvConfig("conv_8bit", 128, 256, 128, 8, 3)
    assert inspect(compile_conv_8bit(shape, LEVELS, config, residual=True, relu=True), H100).spills


@pytest.mark.parametrize("dtype", [LEVELS, E4M3], ids=str)
def test_operands_are_copied_16_bytes_at_a_time_ahead_of_the_products(dtype: torch.dtype) -> None:
    """Levels pass through registers, where 128 is subtracted; all other operands are read from shared memory."""
    shape = ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1)
    config = default_config(shape, dtype, H100)
    item = compile_conv_8bit(shape, dtype, config, residual=False, relu=True)
    text, report = code(item, H100), inspect(item, H100)
    copies = re.findall(r"cp\.async\.c[ag]\.[^\n]*", text)
    assert copies
    assert all("0x10" in copy for copy in copies)
    found = read_ptx(text)
    assert found.register_products == (found.products if dtype == LEVELS else 0)
    assert report.registers <= 128, "two programs of 8 warps fit a multiprocessor"
    assert 2 * (report.shared_memory + 1024) <= H100.shared_memory + 1024
    assert "max.NaN" in text, "ReLU keeps NaN"


@pytest.mark.parametrize("dtype", [LEVELS, E4M3], ids=str)
def test_prepared_images_are_copied_ahead_of_the_products(dtype: torch.dtype) -> None:
    item = stem_of(dtype, H100, 256)
    text, report = code(item, H100), inspect(item, H100)
    copies = re.findall(r"cp\.async\.c[ag]\.[^\n]*", text)
    assert copies
    assert all("0x8" in copy for copy in copies), "two pixels, the stride of the filter"
    assert not read_ptx(text).register_products
    assert report.registers <= 128, "two programs of 8 warps fit a multiprocessor"
    assert 2 * (report.shared_memory + 1024) <= H100.shared_memory + 1024


def test_the_command_names_gpus_without_8_bit_products(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "resnet20", "--size", "32", "--dtype", "e4m3", "--arch", "sm_80", "sm_75"]) == 0
    said = capsys.readouterr().out
    assert "Nothing to compile for sm_80: e4m3 needs sm_89 or later" in said
    assert "Nothing to compile for sm_75: Triton does not use tensor cores" in said
