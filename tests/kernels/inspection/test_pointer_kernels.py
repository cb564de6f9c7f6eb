"""Ahead-of-time compilation without a GPU: a ResNet-50's kernels fit, do not spill, and use the tensor cores."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from fastres.errors import KernelError
from fastres.executors.compilations import plan_compilations
from fastres.folding.build import outline
from fastres.kernels.conv import conv_kernel
from fastres.kernels.inspection.__main__ import main
from fastres.kernels.inspection.ahead_of_time import Compilation, compile_for, target
from fastres.kernels.inspection.pointer_kernels import (
    Report,
    compile_conv,
    compile_stem,
    inspect,
    inspect_all,
    table,
)
from fastres.kernels.routing.cards import A100, CARDS, H100, KNOWN_GPUS, RTX_5090, Gpu, card
from fastres.kernels.routing.rules import (
    STRIP,
    ConvConfig,
    ConvShape,
    StemConfig,
    route_conv,
    route_stem,
    shared_memory,
)
from fastres.kernels.stem import stem_kernel
from fastres.kernels.stem_strip import stem_strip_kernel
from fastres.network.architectures import ARCHITECTURES


def one_of_a_kind(items: Iterable[Compilation]) -> list[Compilation]:
    """Of the convolutions that differ only in channels and residual, return the hardest one for the compiler.

    That is the one with the most channels, with a residual if there is any. The code of the others hardly differs.
    ``python -m fastres.kernels.inspection`` inspects all of them.
    """
    most: dict[object, tuple[tuple[bool, int], Compilation]] = {}
    for item in items:
        asked, kind = (False, 0), (item.kernel, item.types, item.constants, item.num_warps, item.num_stages)
        if item.kernel in ("conv", "conv_8bit"):
            of, types = dict(item.constants), dict(item.types)
            types.pop("residual_ptr", None)
            c, k, residual, _ = (of.pop(name, None) for name in ("C", "K", "HAS_RESIDUAL", "residual_ptr"))
            whole = c % of["BLOCK_K"] == 0, k % of["BLOCK_N"] == 0
            asked, kind = (residual, c * k), (*types.items(), *of.items(), *whole, item.num_warps, item.num_stages)
        if kind not in most or asked > most[kind][0]:
            most[kind] = asked, item
    return [item for _, item in most.values()]


def test_every_kind_of_kernel_is_among_the_chosen() -> None:
    items = plan_compilations(outline(ARCHITECTURES["resnet50"], torch.float16), H100, batch=256)
    chosen = one_of_a_kind(items)
    assert set(chosen) < set(items)
    assert {item.kernel for item in chosen} == {item.kernel for item in items}
    assert len(chosen) < 0.6 * len(items)
    labels = {item.label for item in chosen}
    assert {label.split()[0] for label in labels if "×" in label} == {"1×1/1", "1×1/2", "3×3/1", "3×3/2"}
    assert any("+res" in label for label in labels)
    assert "linear 2048→1000" in labels


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(KNOWN_GPUS))
def test_resnet50_compiles_well(arch: str) -> None:
    plan = outline(ARCHITECTURES["resnet50"], torch.float16)
    items = one_of_a_kind(plan_compilations(plan, KNOWN_GPUS[arch], batch=256))
    if arch == "sm_90":  # the tiles of a single image, too
        small = one_of_a_kind(plan_compilations(plan, KNOWN_GPUS[arch], batch=1))
        items += [item for item in small if item.label.startswith(("stem", "3×3")) and item not in items]
    reports = inspect_all(items, KNOWN_GPUS[arch], workers=1, progress=False)
    assert len(reports) >= 8
    assert not [report for report in reports if report.problems], table(reports)
    products = [report for report, item in zip(reports, items, strict=True) if item.uses_dot]
    if arch == "sm_90":
        # All of a ResNet-50's products have M ≥ 64, N ≥ 32 and a reduction of at least 32.
        assert all(report.wgmma for report in products), table(reports)
    else:
        assert all(report.mma for report in products), table(reports)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnext50_32x4d", "resnet20"])
def test_other_families_use_the_tensor_cores(model: str) -> None:
    plan = outline(ARCHITECTURES[model], torch.bfloat16)
    size = 224 if model.startswith("resnext") else 32
    items = plan_compilations(plan, H100, batch=64, height=size, width=size, dtype=torch.bfloat16)
    if model.startswith("resnext"):  # the 1×1 convolutions are those of ResNet-50
        items = [item for item in items if " g" in item.label]
        assert len(items) >= 4
    items = one_of_a_kind(items)
    reports = inspect_all(items, H100, workers=1, progress=False)
    assert not [report for report in reports if report.problems], table(reports)
    convs = [report for report, item in zip(reports, items, strict=True) if item.kernel == "conv"]
    assert all(report.mma for report in convs), table(reports)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_window_pools_and_squeeze_and_excitation_fit(arch: str) -> None:
    made = [
        item
        for model in ("resnet50d", "seresnet50")
        for item in plan_compilations(outline(ARCHITECTURES[model], torch.float16), KNOWN_GPUS[arch], batch=64)
        if item.kernel in ("window_pool", "gate") or item.label.startswith(("squeeze", "expand"))
    ]
    assert len(made) == 4 + 4 * 3  # a maximum, averages in three stages, three kernels in each of four stages
    made = [*made[:2], *made[3:7], *made[-3:]]  # of the first stage and the last
    reports = inspect_all(dict.fromkeys(made), KNOWN_GPUS[arch], workers=1, progress=False)
    assert not [report for report in reports if report.problems or report.spills], table(reports)


@pytest.mark.slow
def test_float32_does_not_spill() -> None:
    plan = outline(ARCHITECTURES["resnet18"], torch.float32)
    items = one_of_a_kind(plan_compilations(plan, H100, batch=8, dtype=torch.float32))
    reports = inspect_all(items, H100, workers=1, progress=False)
    assert not [report for report in reports if report.problems], table(reports)


def test_relu_keeps_nan() -> None:
    """Checks the PTX. The interpreter's maximum always keeps NaN; a GPU's keeps it only if the kernel asks for it."""
    plan = outline(ARCHITECTURES["resnet18"], torch.float16)
    kernels = {"3×3/1": conv_kernel, "stem fp16": stem_kernel, "stem in strips": stem_strip_kernel}
    items = [(item, gpu) for gpu in (A100, H100) for item in plan_compilations(plan, gpu, batch=1)]
    for name, kernel in kernels.items():
        item, gpu = next((item, gpu) for item, gpu in items if item.label.startswith(name))
        ptx = compile_for(item, kernel, gpu.arch).asm["ptx"]
        assert re.search(r"\bmax\.NaN\.", ptx), name
        assert not re.search(r"\bmax\.(f32|f16|f16x2|bf16x2)\b", ptx), name


def test_a_tile_that_is_too_large_is_reported() -> None:
    """The checks above can fail: this configuration needs too many registers."""
    shape = ConvShape(64, 14, 14, 256, 256, 3, 3, 1, 1)
    config = ConvConfig("conv", 256, 128, 64, 4, 2)
    report = inspect(compile_conv(shape, torch.float16, config, residual=True, relu=True), H100)
    assert report.spills > 0
    assert report.registers >= 250
    assert "spills in its loop" in report.problems


def test_shared_memory_limit() -> None:
    report = Report("conv", H100, 128, 0, 0, 232_449, 4, 4)
    assert report.problems == ("does not fit",)
    assert "does not fit" in table([report])
    assert replace(report, shared_memory=232_448).problems == ()
    assert replace(report, gpu=RTX_5090, shared_memory=101_377).problems == ("does not fit",)


def test_unknown_architecture_is_named() -> None:
    shape = ConvShape(1, 8, 8, 64, 64, 1, 1, 1, 0)
    item = compile_conv(shape, torch.float16, ConvConfig("conv", 64, 64, 64, 4, 2), residual=False, relu=True)
    for arch in ("sm_1", "sm_70", "90", "gfx", "cuda"):
        with pytest.raises(KernelError, match=rf"'{arch}'; give an NVIDIA architecture, sm_75 or later .* or an AMD"):
            inspect(item, replace(H100, arch=arch))
    with pytest.raises(KernelError, match=r"'sm_1'; give an architecture \(sm_80, sm_90, .*\) or a card \(A100"):
        main(["--arch", "sm_1"])


@pytest.mark.parametrize(
    ("arch", "number", "width"),
    [("sm_75", 75, 32), ("sm_120", 120, 32), ("gfx90a", "gfx90a", 64), ("gfx1100", "gfx1100", 32)],
)
def test_targets(arch: str, number: int | str, width: int) -> None:
    found = target(arch)
    assert (found.arch, found.warp_size) == (number, width)


@pytest.mark.parametrize("gpu", [gpu for gpu in CARDS if gpu.arch not in KNOWN_GPUS], ids=lambda gpu: gpu.name)
def test_every_card_has_a_kernel_compiled_for_it(gpu: Gpu) -> None:
    """Tests a small one. ``python -m fastres.kernels.inspection --arch`` checks the larger ones."""
    shape, config = ConvShape(1, 8, 8, 64, 64, 1, 1, 1, 0), ConvConfig("conv", 32, 32, 32, 4, 2)
    report = inspect(compile_conv(shape, torch.float16, config, residual=False, relu=True), gpu)
    assert report.fits
    assert report.problems == (), table([report])
    assert bool(report.mma) == gpu.has_tensor_cores
    assert card(gpu.name) == gpu
    assert card(gpu.arch).arch == gpu.arch


def test_a_stem_of_few_images_refills_its_buffer_after_a_barrier() -> None:
    """Triton omits it between the exchange of the threads for the pool and the copy of the next row's weights."""
    gpu, half = KNOWN_GPUS["sm_80"], torch.float16
    config = route_stem(64, (8, 112, 112), half, gpu, True)
    assert (config.rows, config.num_warps, config.num_stages) == (4, 8, 2)
    item = compile_stem((64, 7, 7, 3), half, half, config, stride=2, padding=3, pool=True)
    assert inspect(item, gpu).problems == ()


def test_bfloat16_stem_compiles() -> None:
    """Triton's maximum of bfloat16 is float32: not the type that the running maximum began with."""
    config = StemConfig("stem_pool", 64, 1, 4, 1)
    item = compile_stem((64, 7, 7, 3), torch.bfloat16, torch.bfloat16, config, stride=2, padding=3, pool=True)
    assert inspect(item, H100).problems == ()


@pytest.mark.parametrize("source", [torch.float32, torch.uint8], ids=str)
def test_images_of_another_dtype_do_not_overwrite_operands_in_flight(source: torch.dtype) -> None:
    """They reach the product through registers. The compiler makes this wrong in a pipeline of two stages."""
    config = replace(route_stem(64, (1, 112, 112), torch.float32, H100, True, "tf32"), rows=1)
    assert config.num_stages == 1
    reports = [
        inspect(compile_stem((64, 7, 7, 3), torch.float16, source, tried, stride=2, padding=3, pool=True), H100)
        for tried in (config, replace(config, num_stages=2))
    ]
    assert reports[0].problems == ()
    if source == torch.float32:  # of uint8 only Triton 3.6's
        assert reports[1].problems == ("overwrites operands in flight",)


def test_tf32_does_not_overwrite_operands_in_flight() -> None:
    config = route_stem(64, (1, 112, 112), torch.float32, H100, True, "tf32")
    reports = []
    for tried in (config, replace(config, num_stages=2)):
        item = compile_stem((64, 7, 7, 3), torch.float32, torch.uint8, tried, stride=2, padding=3, pool=True)
        constants = dict(item.constants) | {"PRECISION": "tf32"}
        reports.append(inspect(replace(item, constants=tuple(constants.items())), H100))
    assert [report.problems for report in reports] == [(), ("overwrites operands in flight",)]


def test_partial_sums_are_published_before_the_arrival_and_read_from_l2() -> None:
    """Checks the PTX: stores, a barrier, the atomic with acquire and release, a barrier, loads that bypass L1."""
    shape, config = ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), ConvConfig("conv", 64, 64, 64, 4, 4, split=8)
    item = compile_conv(shape, torch.float16, config, residual=True, relu=True)
    ptx = compile_for(item, conv_kernel, "sm_90").asm["ptx"].splitlines()
    (atomic,) = [index for index, line in enumerate(ptx) if "atom.global" in line]
    assert "atom.global.gpu.acq_rel.add" in ptx[atomic]
    stores = [index for index, line in enumerate(ptx[:atomic]) if "st.global" in line]
    loads = [index for index, line in enumerate(ptx) if "ld.global.cg" in line]
    barriers = [index for index, line in enumerate(ptx) if "bar.sync" in line]
    assert any(stores[-1] < index < atomic for index in barriers)
    assert any(atomic < index < loads[0] for index in barriers)
    report = inspect(item, H100)
    assert report.fits
    assert not report.spills
    assert report.wgmma


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_stem_in_strips(dtype: torch.dtype) -> None:
    config = route_stem(64, (256, 112, 112), dtype, H100, pool=True)
    assert config.kernel == STRIP
    item = compile_stem((64, 7, 7, 3), dtype, torch.uint8, config, stride=2, padding=3, pool=True)
    ptx = compile_for(item, stem_strip_kernel, "sm_90").asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag][^\n]*", ptx)
    assert copies
    assert all("0x10" in copy for copy in copies)
    report = inspect(item, H100)
    assert report.problems == ()
    assert report.spills == 0, "every register is in use"
    assert report.wgmma == 32
    assert 2 * (report.shared_memory + 1024) <= H100.shared_memory + 1024, "two programs fit a multiprocessor"


def test_prepared_images_are_loaded_16_bytes_at_a_time_ahead_of_the_products() -> None:
    config = StemConfig("stem_pool", 128, 8, 8, 3, prepared=True)
    item = compile_stem((64, 7, 7, 3), torch.float16, torch.uint8, config, stride=2, padding=3, pool=True)
    ptx = compile_for(item, stem_kernel, "sm_90").asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag][^\n]*", ptx)
    assert copies
    assert all("0x10" in copy for copy in copies)
    # The only other loads are of the bias: float32, not two bytes at a time as from images in another layout.
    assert "ld.global.b16" not in ptx
    report = inspect(item, H100)
    assert report.registers <= 128, "two programs of 8 warps fit a multiprocessor"
    assert not report.spills
    assert report.wgmma


@pytest.mark.parametrize(
    ("arch", "shape", "kind"),
    [
        ("sm_90", ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1), "wide"),
        ("sm_90", ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), "split"),
        ("sm_80", ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), "split"),
        ("gfx942", ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), "split"),
    ],
    ids=str,
)
def test_what_the_rules_choose_compiles_well(arch: str, shape: ConvShape, kind: str) -> None:
    gpu = KNOWN_GPUS[arch]
    config = route_conv(shape, torch.float16, gpu)
    assert (config.block_n == 256) is (kind == "wide")
    assert (config.split > 1) is (kind == "split")
    report = inspect(compile_conv(shape, torch.float16, config, residual=False, relu=True), gpu)
    assert report.mma
    assert not report.spills
    assert report.shared_memory <= shared_memory(config, torch.float16, gpu) <= gpu.shared_memory
