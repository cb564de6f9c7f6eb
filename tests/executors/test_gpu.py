"""The GPU executor on whole networks: in Triton's interpreter, or on a GPU if there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.executors.gpu import (
    SCHEDULES_KEPT,
    GpuExecutor,
    block_of,
    conv_shape,
    describe,
    in_micro_batches,
    pack,
    tuned_network,
)
from fastres.folding.build import build_plan, outline
from fastres.folding.fusion import joinable
from fastres.kernels import dispatch
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import gpu_of
from fastres.kernels.routing.rules import ConvConfig
from fastres.kernels.routing.tables import Index, Layer, Network, Table, Tuned, TunedBlock
from fastres.network.architectures import Architecture, get_architecture
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from fastres.network.plan import Conv, Head, Stem
from fastres.roofline.gpu_shapes import linear_shape
from fastres.text import dtype_name
from tests.measures import Yardstick
from tests.subjects import HOPPER, shallow

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
hopper = pytest.mark.skipif(not (INTERPRETED or HOPPER), reason="the kernels for joined steps are written for sm_90")


# Small networks with the extra steps of ResNet-D and SE-ResNet. The published ones are too large for the interpreter.
SMALL = {
    "deep stem, average pool": Architecture(
        "small", "bottleneck", (1, 2), (16, 24), stem="deep", stem_widths=(8, 8, 16), shortcut="average_pool"
    ),
    "squeeze and excitation": Architecture("small", "bottleneck", (1, 2), (16, 24), squeeze_excitation=True),
    "both, basic blocks": Architecture(
        "small",
        "basic",
        (1, 1, 1),
        (16, 24, 40),
        stem="deep",
        stem_widths=(24, 16, 32),
        shortcut="average_pool",
        squeeze_excitation=True,
    ),
}


def architecture(name: str) -> Architecture:
    if name == "grouped":
        return shallow("resnext50_32x4d")
    return SMALL[name] if name in SMALL else get_architecture(name)


def executor(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, GpuExecutor]:
    arch = architecture(name)
    module = calibrated(arch).to(DEVICE)
    return module, GpuExecutor(build_plan(module.state_dict(), arch, dtype=dtype))


def batches(batch: int, h: int, w: int) -> list[Tensor]:
    """Batches of images. A test runs the network on the first; the others show how large eager's error can be."""
    return [smooth_images(batch, h, w, seed=seed).to(DEVICE) for seed in (7, 17, 27, 37)]


def check(name: str, batch: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> None:
    """The error measure of all network tests: no further from float64 than eager's own errors allow."""
    module, run = executor(name, dtype)

    def logits(x: Tensor) -> Tensor:
        (found,) = run.run(x.to(dtype))
        assert found.dtype == torch.float32
        return found

    Yardstick(module, *batches(batch, h, w)).check(logits, dtype, batches=1)


def test_resnet18() -> None:
    check("resnet18", 2, 64, 64)


@pytest.mark.skipif(not HOPPER, reason="kernels start early on sm_90")
def test_kernels_that_start_early_compute_the_same() -> None:
    _, run = executor("resnet50", torch.float16)
    x = smooth_images(2, 96, 128, seed=3).to(DEVICE, torch.float16)
    plain = Network("resnet50", 2, 96, 128, "float16", joined=False)
    (expected,) = run.run_as(x, ("logits",), plain)
    for _ in range(50):
        (found,) = run.run_as(x, ("logits",), replace(plain, early=True))
        assert torch.equal(found, expected)


def test_groups_as_wide_as_resnext50s() -> None:
    check("grouped", 2, 33, 47)


def test_resnet50_of_odd_size() -> None:
    check("resnet50", 2, 39, 65)


@pytest.mark.parametrize("name", ["resnet20", "plain20"])
def test_cifar_networks(name: str) -> None:
    check(name, 3, 32, 35)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("h", "w"), [(64, 64), (45, 83)])
def test_resnet_d_and_squeeze_and_excitation(name: str, h: int, w: int) -> None:
    check(name, 3, h, w)


@pytest.mark.parametrize("name", SMALL)
def test_resnet_d_and_squeeze_and_excitation_in_float16(name: str) -> None:
    check(name, 2, 39, 53, torch.float16)


def test_float16() -> None:
    check("resnet18", 2, 33, 64, torch.float16)


def test_intermediate_values_and_pixels() -> None:
    module, run = executor("resnet18")
    given = [pixels(x).to(DEVICE) for x in batches(2, 35, 49)]
    values = run._plan.features
    mean, std = (torch.tensor(v, device=DEVICE).double().view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def meaning(network: Any, x: Tensor) -> dict[str, Tensor]:
        y = ((x.double() / 255 - mean) / std).to(network.fc.weight.dtype)
        found = {"stem": network.maxpool(network.relu(network.bn1(network.conv1(y))))}
        y = found["stem"]
        for name in list(values)[1:]:
            found[name] = y = network.get_submodule(name)(y)
        found["pooled"] = y.mean((2, 3))
        return found | {"logits": network.fc(found["pooled"])}

    names = (*values, "pooled", "logits")
    x = given[0]
    *features, pooled, logits = run.run(x, (*values.values(), "pooled", "logits"))
    found = dict(zip(names, (*features, pooled, logits), strict=True))
    Yardstick(module, *given, forward=meaning).check(lambda _: found, batches=1)
    # The returned tensor has its own memory: a second call does not change it.
    kept = [value.clone() for value in features]
    run.run(x.flip(0), tuple(values.values()))
    assert all(torch.equal(value, before) for value, before in zip(features, kept, strict=True))


def test_stops_where_nothing_more_is_asked_for() -> None:
    _, run = executor("resnet20")
    (stem,) = run.run(smooth_images(1, 32, 32).to(DEVICE), ("stem",))
    assert stem.shape == (1, 16, 32, 32)
    assert stem.is_contiguous(memory_format=torch.channels_last)


def test_schedules_are_bounded() -> None:
    _, run = executor("resnet20")
    for size in range(SCHEDULES_KEPT + 5):
        run._schedule((1, 8 + size, 8, 3), ("logits",))
    assert len(run._schedules) == SCHEDULES_KEPT


def test_packing_keeps_the_network() -> None:
    plan = build_plan(calibrated(get_architecture("resnext50_32x4d")).state_dict(), get_architecture("resnext50_32x4d"))
    for before, after in zip(plan, pack(plan), strict=True):
        assert (before.name, before.reads, before.output) == (after.name, after.reads, after.output)
        if isinstance(after, Stem):
            assert after.weight.shape == (64, 7, 32)
        if isinstance(before, Conv) and before.groups > 1:
            assert isinstance(after, Conv)
            assert after.weight.shape[3] >= 32
            assert after.weight.numel() * before.groups == before.weight.numel() * before.groups**2 // after.groups


def test_explanation_names_kernels_and_merged_groups() -> None:
    plan = build_plan(calibrated(get_architecture("resnext50_32x4d")).state_dict(), get_architecture("resnext50_32x4d"))
    shapes = plan.shapes(1, 64, 64)
    rows = {s.name: describe(s, shapes[s.input], torch.float32, torch.device(DEVICE)) for s in plan}
    assert rows["stem"][0] == "stem_pool"
    assert rows["layer1.0.conv2"][2].startswith("32 groups run as 4 block-diagonal ones")
    assert rows["head"][0] == "average_pool, conv"
    assert {isinstance(step, Head) for step in plan} == {True, False}


TINY = Architecture("tiny", "bottleneck", (2, 1), (32, 64), stem="cifar", num_classes=10)
IMAGES = 65  # more than the 64 images that a tile of the TMA kernels needs


def tuned_for_joining(run: GpuExecutor, h: int, w: int, micro: Network | None = None) -> Index:
    """A table in which joining saves time wherever a kernel supports it, and longer runs save more."""
    gpu, found = gpu_of(run.device), []
    shapes = run._outline.shapes(IMAGES, h, w)
    for runs in joinable(run._plan.steps).values():
        for step in runs:
            block = block_of(step, shapes[step.input], run.dtype)
            kernel = "fused" if block.fused else "gemm" if block.shortcut_stride == 1 else "conv_tma"
            config = ConvConfig(kernel, 64, 64, 64, 4, 2)
            if not dispatch.why_not_block(kernel, block, run.dtype, gpu):
                found.append(TunedBlock(block, config, 1.0, 1.0 + len(step.parts)))
    return Index(Table((), tuple(found), (micro,) if micro else ()))


@hopper
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("images", [64] if INTERPRETED else [0, 64], ids=lambda images: f"{images} at a time")
def test_joined_steps(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, images: int) -> None:
    module = calibrated(TINY).to(DEVICE)
    plan = build_plan(module.state_dict(), TINY, dtype=dtype)
    yardstick = Yardstick(module, *batches(IMAGES, 8, 9))
    micro = Network("tiny", IMAGES, 8, 9, dtype_name(dtype), True, "layer1", images)
    table = tuned_for_joining(GpuExecutor(plan), 8, 9, micro)
    monkeypatch.setattr(dispatch, "tuned", lambda gpu: table)

    run = GpuExecutor(plan)
    yardstick.check(lambda x: run.run(x.to(dtype))[0], dtype, batches=1)
    # Joined runs of two, three and four convolutions. The last of 65 images runs alone, which is too few for the fused
    # kernel. It has its own schedule: one shortcut is merged, and its other convolutions run one by one.
    steps = [[len(step.parts) for step in schedule.steps] for schedule in run._schedules.values()]
    assert steps == ([[1, 1, 4, 3, 3, 1]] if not images else [[1, 1, 4, 2], [1, 1, 1, 2, 1, 1, 1], [1, 3, 1]])


@torch.no_grad()
def test_split_reductions_share_one_set_of_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    module, run = executor("resnet20")
    yardstick = Yardstick(module, *batches(1, 9, 8))
    shapes = run._outline.shapes(1, 9, 8)
    config = ConvConfig("conv", 32, 32, 16, 4, 2, split=3)
    convs = [step for step in run._plan if isinstance(step, Conv)]
    layers = {Layer.of(conv_shape(c, shapes[c.input]), torch.float32, c.residual is not None) for c in convs}
    head = run._plan.head
    layers.add(Layer.of(linear_shape(head, shapes[head.input]), torch.float32, False, classifier=True))
    monkeypatch.setattr(dispatch, "tuned", lambda gpu: Index(Table(tuple(Tuned(n, config, 1.0, 1.0) for n in layers))))
    dispatch.route.cache_clear()
    try:
        yardstick.check(lambda x: run.run(x)[0], batches=1)
        (schedule,) = run._schedules.values()
        assert schedule.arrivals == 9 * 8 // 32 + 1
        for step in (convs[0], head):
            assert describe(step, shapes[step.input], torch.float32, run.device)[1].endswith("reduction split in 3")
    finally:
        dispatch.route.cache_clear()


def test_micro_batches_are_for_the_case_that_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Network("resnet50", 256, 224, 224, "float16", True, "layer2", 32)
    monkeypatch.setattr(dispatch, "tuned", lambda gpu: Index(Table((), (), (entry,))))
    plan, device = outline(get_architecture("resnet50"), torch.float16), torch.device(DEVICE)

    def asked(n: int, size: int = 224, dtype: torch.dtype = torch.float16) -> Network | None:
        return tuned_network(plan, (n, size, size, 3), dtype, device)

    assert asked(256) == asked(256, dtype=torch.bfloat16) == entry
    assert asked(128) is asked(256, size=192) is asked(256, dtype=torch.float32) is None
    assert in_micro_batches(entry, 256, ("logits", "pooled"))
    assert not in_micro_batches(entry, 256, ("logits", "layer1.2"))
    assert not in_micro_batches(entry, 32, ("logits",))
