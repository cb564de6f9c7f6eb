"""Launches compile the same code as the ahead-of-time inspection, for every kernel and for whole networks.

The code has the same key in Triton's cache, so a launch does not compile again what was compiled ahead of time.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastres.bench.measure.calibration import calibrated
from fastres.executors.compilations import plan_compilations
from fastres.executors.gpu import GpuExecutor, block_of
from fastres.folding.build import build_plan, outline
from fastres.folding.fusion import joinable
from fastres.kernels import conv_specialized, dispatch
from fastres.kernels.conv_8bit import E4M3, LEVELS, WEIGHT_DTYPES, conv2d_8bit_into, default_config
from fastres.kernels.inspection import kernels_8bit, pointer_kernels, tma_kernels
from fastres.kernels.inspection.ahead_of_time import Compilation, compile_for
from fastres.kernels.launch import INTERPRETED, early_launches
from fastres.kernels.prepare import prepare
from fastres.kernels.routing.cards import H100
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.routing.tables import Index, Network, Table, TunedBlock
from fastres.kernels.stem_8bit import image_lanes, pack_stem_weight_8bit, stem_8bit_into, stem_config
from fastres.network.architectures import Architecture, get_architecture
from tests.subjects import EVERY_STEP

from .dry_launches import dry_launches

pytestmark = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="compiles as for a GPU, without one")


def inspected(item: Compilation) -> str:
    kernels = pointer_kernels._KERNELS
    kernel = kernels[item.kernel] if item.kernel in kernels else tma_kernels._kernel(item.kernel)
    key: str = compile_for(item, kernel, "sm_90").hash
    return key


GROUPS = Architecture("groups", "bottleneck", (1, 2), (64, 128), groups=32, width_per_group=4)

CONFIGS = [
    ConvConfig("conv", 64, 64, 64, 4, 3),
    ConvConfig("conv", 64, 64, 64, 4, 3, split=4),
    ConvConfig("gemm", 128, 128, 64, 8, 3),
    ConvConfig("gemm_persistent", 128, 128, 64, 8, 3),
    ConvConfig("conv_tma", 128, 128, 64, 8, 3),
    ConvConfig("conv_tma_persistent", 128, 128, 64, 8, 3),
    *conv_specialized.CANDIDATES[:1],
    *conv_specialized.CANDIDATES[-1:],
]


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kernel} {config.split}")
def test_convolutions(monkeypatch: pytest.MonkeyPatch, config: ConvConfig, residual: bool) -> None:
    size, stride = (1, 1) if config.kernel.startswith("gemm") else (3, 2)
    shape = ConvShape(64, 14, 14, 64, 128, size, size, stride, size // 2)
    dtype = torch.bfloat16
    x, weight = torch.zeros(64, 14, 14, 64, dtype=dtype), torch.zeros(128, size, size, 64, dtype=dtype)
    y = torch.zeros(64, shape.P, shape.Q, 128, dtype=dtype)
    settings: dict[str, Any] = {"stride": stride, "padding": shape.padding, "relu": True, "config": config}
    with dry_launches(monkeypatch) as launched:
        dispatch.convolve_into(y, x, weight, torch.zeros(128), y.clone() if residual else None, **settings)
    compiled = pointer_kernels.compile_conv if config.kernel == "conv" else tma_kernels.compile_tma
    (launch,) = launched
    assert launch.key == inspected(compiled(shape, dtype, config, residual=residual, relu=True))


@pytest.mark.parametrize("dtype", [LEVELS, E4M3], ids=str)
def test_convolutions_in_8_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    shape = ConvShape(16, 14, 14, 64, 128, 3, 3, 2, 1)
    x, weight = torch.zeros(16, 14, 14, 64, dtype=dtype), torch.zeros(128, 3, 3, 64, dtype=WEIGHT_DTYPES[dtype])
    y, ones = torch.zeros(16, 7, 7, 128, dtype=dtype), torch.ones(128)
    for residual, zero_points in ((None, (1, 0)), (y.clone(), (0, 16))):  # Triton must not specialise on these
        with dry_launches(monkeypatch) as launched:
            conv2d_8bit_into(
                y, x, weight, ones, ones, residual, x_scale=1.0, output_scale=2.0, residual_zero_point=zero_points[0],
                output_zero_point=zero_points[1], stride=2, padding=1, relu=True,
            )  # fmt: skip
        config = default_config(shape, dtype, H100, residual=residual is not None)
        (launch,) = launched
        item = kernels_8bit.compile_conv_8bit(shape, dtype, config, residual=residual is not None, relu=True)
        assert launch.key == inspected(item)


@pytest.mark.parametrize("dtype", [LEVELS, E4M3], ids=str)
def test_stems_in_8_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    weight, ones = torch.zeros(64, 7, 7, 3, dtype=WEIGHT_DTYPES[dtype]), torch.ones(64)
    y, x = torch.zeros(2, 16, 16, 64, dtype=dtype), torch.zeros(2, 3, 64, 64)
    lanes = image_lanes((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), weight.dtype, x.device)
    with dry_launches(monkeypatch) as launched:
        stem_8bit_into(
            y, x, pack_stem_weight_8bit(weight), ones, ones, lanes, filter_size=7, stride=2, padding=3, pool=True
        )
    assert [launch.key for launch in launched] == [
        inspected(kernels_8bit.compile_prepare_8bit(dtype, torch.float32, padding=3)),
        inspected(
            kernels_8bit.compile_stem_8bit((64, 7, 7, 3), dtype, stem_config(16, 16, 2, H100), stride=2, pool=True)
        ),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source"),
    [("every step", torch.float32), ("every step", torch.uint8), ("groups", torch.float16)],
    ids=str,
)
def test_networks(monkeypatch: pytest.MonkeyPatch, name: str, source: torch.dtype) -> None:
    """Runs whole networks as the rules choose. For 16 larger images a kernel first prepares them for the stem."""
    arch = EVERY_STEP if name == "every step" else GROUPS
    plan = build_plan(calibrated(arch).state_dict(), arch, dtype=torch.float16)
    batch, size = (2, 64) if name == "every step" else (16, 224)
    with dry_launches(monkeypatch) as launched:
        GpuExecutor(plan).run(torch.zeros(batch, 3, size, size, dtype=source))
    items = plan_compilations(plan, H100, batch=batch, height=size, width=size, dtype=torch.float16)
    known = {inspected(item) for item in items}
    assert [launch.kernel for launch in launched if launch.key not in known] == []
    assert len({launch.key for launch in launched}) == len(known) - 2, "except for the other kinds of pixels"
    assert not any(launch.early or "griddepcontrol" in launch.ptx for launch in launched)


@pytest.mark.slow
def test_kernels_that_start_early_wait_before_they_touch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan(calibrated(EVERY_STEP).state_dict(), EVERY_STEP, dtype=torch.float16)
    shared = ConvConfig("conv", 64, 64, 32, 4, 3, split=4)
    monkeypatch.setattr(dispatch, "route", lambda *_of, **_named: shared)
    how = Network("small", 2, 64, 64, "float16", joined=False, early=True)
    with dry_launches(monkeypatch) as launched:
        GpuExecutor(plan).run_as(torch.zeros(2, 3, 64, 64, dtype=torch.float16), ("logits",), how)
    kinds = {"stem_kernel", "conv_kernel", "average_pool_kernel", "window_pool_kernel", "gate_kernel"}
    assert {launch.kernel for launch in launched} == kinds
    with dry_launches(monkeypatch) as more, early_launches():
        prepare(torch.zeros(2, 3, 64, 64), torch.float16, torch.ones(4), torch.zeros(4), padding=3, taps=8)
    for launch in [*launched, *more]:
        assert launch.early, launch.kernel
        wait = launch.ptx.index("griddepcontrol.wait")
        assert launch.ptx.index("griddepcontrol.launch_dependents") < wait
        touched = re.search(r"\b(ld|st)\.global|\bcp\.async|\batom\.|\bred\.", launch.ptx)
        assert touched
        assert wait < touched.start(), launch.kernel


def test_an_early_kernel_is_inspected_as_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = ConvConfig("conv", 64, 64, 64, 4, 3), ConvShape(1, 14, 14, 64, 64, 3, 3, 1, 1)
    x, weight = torch.zeros(1, 14, 14, 64).half(), torch.zeros(64, 3, 3, 64).half()
    with dry_launches(monkeypatch) as launched, early_launches():
        dispatch.convolve_into(x.clone(), x, weight, torch.zeros(64), padding=1, config=config)
    item = pointer_kernels.compile_conv(shape, torch.float16, config, residual=False, relu=False)
    item = replace(item, constants=tuple((dict(item.constants) | {"EARLY": True}).items()))
    (launch,) = launched
    assert launch.key == inspected(item)
    waits = launch.ptx.index("griddepcontrol.wait")
    assert waits < launch.ptx.index("cp.async") < launch.ptx.index("st.global")


@pytest.mark.slow
def test_joined_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of a ResNet-50 that a kernel supports is joined, as a tuned table may demand."""
    arch = get_architecture("resnet50")
    plan, shapes = outline(arch, torch.float16), outline(arch, torch.float16).shapes(64, 64, 64)
    entries = []
    for run in (run for runs in joinable(plan.steps).values() for run in runs):
        block = block_of(run, shapes[run.input], torch.float16)
        kernel = "fused" if block.fused else "gemm" if block.shortcut_stride == 1 else "conv_tma"
        config = ConvConfig(kernel, 128, 64, 64, 8, 3)
        if not dispatch.why_not_block(kernel, block, torch.float16, H100):
            entries.append(TunedBlock(block, config, 1.0, 100.0))
    found = Index(Table((), tuple(dict.fromkeys(entries))))
    monkeypatch.setattr(dispatch, "tuned", lambda _gpu: found)
    weights = build_plan(calibrated(arch).state_dict(), arch, dtype=torch.float16)
    with dry_launches(monkeypatch) as launched:
        GpuExecutor(weights).run(torch.zeros(64, 3, 64, 64, dtype=torch.float16))
    assert {launch.kernel for launch in launched} >= {"fused_kernel", "conv_tma_kernel"}
    known = {inspected(tma_kernels.compile_block(entry.layer, entry.config)) for entry in entries}
    joined = [launch for launch in launched if launch.kernel in ("fused_kernel", "conv_tma_kernel", "gemm_kernel")]
    assert all(launch.key in known for launch in joined)
