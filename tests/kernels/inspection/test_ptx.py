"""Reading PTX: the compiled kernels follow each rule, and violations of each rule are detected."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import torch
import triton

from fastres.kernels.conv import conv_kernel
from fastres.kernels.inspection.ahead_of_time import compile_for
from fastres.kernels.inspection.pointer_kernels import Report, compile_conv, fence_note, table
from fastres.kernels.inspection.ptx import Ptx, leaves_out_fence, parse, read_ptx
from fastres.kernels.inspection.tma_kernels import TmaReport
from fastres.kernels.routing.cards import A100, H100
from fastres.kernels.routing.rules import ConvConfig, ConvShape

REPORT = Report("conv", H100, 100, 0, 0, 1000, 1, 1)
TMA = """
    wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r1,%r2}, %rd5, %rd6, %p1, 1, 1, 0, 0;
    wgmma.wait_group.sync.aligned 1;
    bar.sync 0;
    @%p2 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd1, {%r4, %r5}], [%r6];
    @%p2 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r4, %r5}], [%r3];
"""
LOOP = """
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
    cp.async.wait_group 1;
    bar.sync 0;
    fence.proxy.async.shared::cta;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r1,%r2}, %rd5, %rd6, %p1, 1, 1, 0, 0;
    wgmma.wait_group.sync.aligned 1;
    bar.sync 0;
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    @%p3 bra $L__BB0_1;
    ret;
"""


def without(text: str, line: str, occurrence: int = 0) -> str:
    """Return ``text`` without one of the lines that begin with ``line``: the one numbered ``occurrence``."""
    found = list(re.finditer(rf"^\s*{re.escape(line)}.*\n", text, re.MULTILINE))[occurrence]
    return text[: found.start()] + text[found.end() :]


def test_operands_through_registers_and_missing_barriers_are_seen() -> None:
    assert read_ptx(TMA) == Ptx(1, 0, 1, 1, 0, 0)
    assert TmaReport(REPORT, read_ptx(TMA)).good
    registers = read_ptx(TMA.replace("%rd5,", "{%r7,%r8},"))
    assert registers.register_products == 1
    assert TmaReport(REPORT, registers).problems == ("multiplies through registers",)
    assert read_ptx(TMA.replace("bar.sync 0;", "")).unguarded == 1
    assert read_ptx(TMA.replace("bar.sync 0;", "mbarrier.arrive.shared::cta.b64 _, [%r3];\nbar.sync 0;")).unguarded == 1
    armed = TMA.replace("bar.sync 0;", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 64;\nbar.sync 0;")
    assert read_ptx(armed).unguarded == 0


def test_a_loop_is_followed_round() -> None:
    assert read_ptx(LOOP) == Ptx(1, 0, 0, 0, 0, 0)
    assert read_ptx(without(LOOP, "bar.sync", 1)).unguarded == 1
    # The refill comes first in the loop, and the wait for the last reader after it, so no wait precedes it in the text.
    copy, wait = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", "cp.async.wait_group 1;"
    turned = without(without(LOOP, copy, 1), "bar.sync", 1).replace(wait, f"{copy}\n{wait}")
    assert read_ptx(turned).unguarded == 1


def test_a_barrier_that_may_not_run_guards_nothing() -> None:
    assert read_ptx(TMA.replace("bar.sync", "@%p4 bar.sync")).unguarded == 1
    around = LOOP.replace("    bar.sync 0;\n    cp.", "    @%p4 bra $L__BB0_2;\n    bar.sync 0;\n$L__BB0_2:\n    cp.")
    assert read_ptx(around).unguarded == 1


def test_a_missing_fence_is_seen() -> None:
    unfenced = read_ptx(without(LOOP, "fence"))
    assert unfenced.unfenced == 1
    report = replace(REPORT, unfenced=unfenced.unfenced)
    known = leaves_out_fence(triton.__version__)
    assert report.problems == (() if known else ("reads copies with no fence",))
    assert ("leaves out the fence" in fence_note([report, REPORT])) == known
    assert fence_note([REPORT]) == ""


@pytest.mark.parametrize(
    ("version", "known"), [("3.6.0", True), ("3.7.0", True), ("3.7.1", False), ("3.10.0+git1", False), ("4.0", False)]
)
def test_versions_that_leave_out_the_fence(version: str, known: bool) -> None:
    assert leaves_out_fence(version) == known


@functools.cache
def compiled(arch: str) -> str:
    """The PTX of a 3×3 convolution with 8 warps, which refills its buffers with ``cp.async``."""
    shape, config = ConvShape(64, 14, 14, 256, 256, 3, 3, 1, 1), ConvConfig("conv", 128, 128, 64, 8, 3)
    item = compile_conv(shape, torch.float16, config, residual=True, relu=True)
    ptx: str = compile_for(item, conv_kernel, arch).asm["ptx"]
    return ptx


@pytest.mark.parametrize("gpu", [A100, H100], ids=lambda gpu: gpu.arch)
def test_the_pointer_kernel_is_guarded_and_that_would_show(gpu: object) -> None:
    ptx = compiled(gpu.arch)  # type: ignore[attr-defined]
    found = read_ptx(ptx)
    assert found.unguarded == 0
    assert bool(found.products) == (gpu is H100)
    loop = ptx.index("=>This Inner Loop")
    before_refill = (
        len(re.findall(r"bar\.sync", ptx[:loop])) + 1
    )  # the first barrier of the loop waits for the copies to arrive
    doctored = without(ptx, "bar.sync", before_refill)
    assert read_ptx(doctored).unguarded >= 4
    assert "refills a buffer with no barrier" in replace(REPORT, unguarded=1).problems
    assert "refills a buffer with no barrier" in table([replace(REPORT, unguarded=1)])


def test_the_pointer_kernel_is_fenced_by_the_recommended_triton() -> None:
    found = read_ptx(compiled("sm_90"))
    assert found.unfenced == (found.products if leaves_out_fence(triton.__version__) else 0)


def test_labels_that_inline_assembly_repeats_are_told_apart() -> None:
    code = parse(
        "waitLoop:\n@!complete bra.uni waitLoop;\nbar.sync 0;\nwaitLoop:\n@!complete bra.uni waitLoop;\nret;\n"
    )
    assert [line.next for line in code] == [(0, 1), (2,), (2, 3), ()]


def test_tables_of_branches_are_followed() -> None:
    code = parse("brx.idx %r1, $L_brx_0;\n$L_a:\nret;\n$L_b:\nret;\n$L_brx_0: .branchtargets\n$L_a,\n$L_b;\n")
    assert code[0].next == (1, 2)
