"""Folding and the Plan: exact in float64, rounded once, laid out NHWC/KRSC."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastres.bench.measure.calibration import calibrated
from fastres.errors import InputError
from fastres.folding.build import build_plan, fold_batch_norm, outline, pad_shortcut_weight
from fastres.kernels.reference import nchw
from fastres.network.architectures import ARCHITECTURES, get_architecture, state_dict_shapes
from fastres.network.plan import Conv, Plan
from fastres.weights.published import entries
from tests.network.test_architectures import TORCHVISION


def plan_of(name: str, dtype: torch.dtype = torch.float32) -> Plan:
    arch = get_architecture(name)
    return build_plan(calibrated(arch).state_dict(), arch, dtype=dtype)


def test_folded_conv_is_conv_and_batch_norm() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 10, 3, bias=False).double(), nn.BatchNorm2d(10).double().eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(10))
        norm.running_var.copy_(torch.rand(10) + 0.1)
        x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
        state = {f"bn.{key}": value for key, value in norm.state_dict().items()}
        weight, bias = fold_batch_norm(conv.weight, state, "bn")
        torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), norm(conv(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_rounded_once_from_float64(dtype: torch.dtype) -> None:
    arch = get_architecture("resnet18")
    state = calibrated(arch).state_dict()
    plan = build_plan(state, arch, dtype=dtype)
    step = next(step for step in plan if step.name == "layer2.0.downsample")
    weight, bias = fold_batch_norm(state["layer2.0.downsample.0.weight"], state, "layer2.0.downsample.1")
    assert torch.equal(nchw(step.weight), weight.to(dtype))
    assert step.weight.is_contiguous()
    assert step.weight.shape == (128, 1, 1, 64)
    assert step.bias.dtype == torch.float32
    assert torch.equal(step.bias, bias.float())


def test_half_precision_checkpoints_are_folded_in_float64() -> None:
    arch = get_architecture("resnet20")
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in calibrated(arch).state_dict().items()
    }
    upcast = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    for ours, exact in zip(build_plan(state, arch), build_plan(upcast, arch), strict=True):
        assert torch.equal(ours.weight, exact.weight)


@pytest.mark.parametrize(("c", "k"), [(16, 32), (32, 64), (3, 8)])
def test_option_a_shortcut_is_a_padded_copy(c: int, k: int) -> None:
    x = torch.randn(2, c, 7, 5)
    y = nn.functional.conv2d(x, nchw(pad_shortcut_weight(c, k)), stride=2)
    before = (k - c) // 2
    expected = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, k - c - before))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", TORCHVISION)
def test_multiply_accumulates_are_the_published_ones(name: str) -> None:
    costs = outline(get_architecture(name), torch.float32).costs(1, 224, 224)
    published = next(iter(entries(name).values())).gmacs
    assert sum(cost.flops for cost in costs) / 2e9 == pytest.approx(published, abs=6e-4)


def test_bytes_of_a_step() -> None:
    plan = outline(get_architecture("resnet50"), torch.float16)
    cost = {cost.name: cost for cost in plan.costs(2, 224, 224)}["layer1.0.conv3"]
    pixels = 2 * 56 * 56
    activations = pixels * 64 + pixels * 256 + pixels * 256  # input, residual, output
    assert cost.bytes == 2 * (activations + 64 * 256) + 4 * 256
    assert cost.flops == 2 * pixels * 64 * 256


# The widest ResNeXts have gigabytes of weights, and the same kinds of steps as the others.
@pytest.mark.parametrize(
    "name", [name for name, row in ARCHITECTURES.items() if row.groups * row.width_per_group <= 256]
)
def test_outline_is_the_plan_without_data(name: str) -> None:
    arch = get_architecture(name)
    state = {key: torch.ones(shape) for key, shape in state_dict_shapes(arch).items()}
    plan, sketch = build_plan(state, arch), outline(arch, torch.float32)
    assert plan.features == sketch.features
    for step, empty in zip(plan, sketch, strict=True):
        assert (step.name, step.reads, step.output) == (empty.name, empty.reads, empty.output)
        assert [(w.shape, b.shape) for w, b in step.parameters] == [(w.shape, b.shape) for w, b in empty.parameters]
        assert empty.weight.is_meta
    assert [cost.bytes for cost in plan.costs(1, 64, 64)] == [cost.bytes for cost in sketch.costs(1, 64, 64)]


def test_values_are_written_before_they_are_read() -> None:
    for arch in ARCHITECTURES.values():
        written = {"input"}
        for step in outline(arch, torch.float32):
            assert set(step.reads) <= written
            assert step.output not in written
            written.add(step.output)
        assert "logits" in written


def test_plain_networks_add_nothing_and_pad_shortcuts_are_convolutions() -> None:
    assert not any(
        isinstance(step, Conv) and step.residual for step in outline(get_architecture("plain34"), torch.float32)
    )
    shortcut = next(step for step in plan_of("resnet20") if step.name == "layer2.0.downsample")
    assert isinstance(shortcut, Conv)
    assert (shortcut.stride, shortcut.relu, tuple(shortcut.weight.shape)) == (2, False, (32, 1, 1, 16))


def test_plan_prints_as_a_table() -> None:
    text = str(outline(get_architecture("resnet50"), torch.float32))
    assert text.startswith("resnet50: 54 steps, batch 1, 224×224")
    row = next(line for line in text.splitlines() if line.startswith("layer1.0.conv3"))
    assert "layer1.0.conv2 + layer1.0.downsample" in row
    assert "1×56×56×256" in row
    assert "8,178.4" in text.splitlines()[-1]


def test_images_below_the_least_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"resnet50 takes images of at least 32×32 pixels but was given 31×64"):
        outline(get_architecture("resnet50"), torch.float32).shapes(1, 31, 64)
