"""Rounding weights to 8 bit, and which values need a scale."""

from __future__ import annotations

import pytest
import torch

from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.executors.cpu import CpuExecutor
from fastres.folding.build import build_plan, outline
from fastres.network.architectures import get_architecture
from fastres.network.quantisation import WEIGHT_LIMIT, WEIGHT_LIMIT_WITHOUT_VNNI
from fastres.quantisation.rounding import dequantised, quantisable, quantise_plan, quantise_weight, values_in_8_bit
from tests.measures import relative_error
from tests.quantisation.simple import scales_of


@pytest.mark.parametrize("limit", [WEIGHT_LIMIT, WEIGHT_LIMIT_WITHOUT_VNNI])
def test_weights_are_rounded_to_the_nearest_level(limit: int) -> None:
    weight = torch.randn(7, 3, 3, 5, dtype=torch.float32, device="cpu")
    weight[4] = 0
    levels, scale = quantise_weight(weight, limit)
    assert levels.dtype == torch.int8
    assert scale.shape == (7,)
    assert int(levels.abs().amax()) == limit
    assert scale[4] == 1
    error = (levels.double() * scale.double().view(-1, 1, 1, 1) - weight.double()).abs().amax((1, 2, 3))
    assert (error <= 0.5001 * scale.double()).all()


def test_every_value_between_the_stem_and_the_pool_needs_a_scale() -> None:
    plan = outline(get_architecture("resnet50d"), torch.float32)
    values = values_in_8_bit(plan, quantisable(plan))
    assert values == ("input", *(step.output for step in plan if step.output != "logits"), "pooled")


def test_a_step_in_float_needs_no_scales() -> None:
    plan = outline(get_architecture("resnet18"), torch.float32)
    assert values_in_8_bit(plan, ["layer1.0.conv1"]) == ("stem", "layer1.0.conv1")
    assert values_in_8_bit(plan, ["layer1.0.conv2"]) == ("stem", "layer1.0.conv1", "layer1.0")
    deep = outline(get_architecture("resnet50d"), torch.float32)
    assert values_in_8_bit(deep, ["layer1.0.conv1"]) == ("conv1.6", "stem", "layer1.0.conv1")


def test_what_a_plan_in_8_bit_stands_for_is_near_the_float_plan() -> None:
    network = calibrated(get_architecture("resnet20"))
    plan = build_plan(network.state_dict(), network.architecture)
    x = pixels(smooth_images(2, 32, 32))
    again = dequantised(quantise_plan(plan, scales_of(plan, x), keep=("layer1.0.conv1",)))
    assert again.quantisation is None
    for step, expected in zip(again, plan, strict=True):
        for (weight, _), (float_weight, _) in zip(step.parameters, expected.parameters, strict=True):
            assert weight.dtype == torch.float32
            # Half a level of the channel's largest weight; the stem's levels are those of its weights for pixels.
            largest = float_weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
            factor = max(plan.stem.std) / min(plan.stem.std) if step.kind == "stem" else 1
            assert ((weight - float_weight).abs() <= factor * largest * 0.501 / WEIGHT_LIMIT).all()
    assert relative_error(CpuExecutor(again).run(x)[0], CpuExecutor(plan).run(x)[0]) < 0.05
    # A picture in the mean colour gives the stem's bias in float and in 8 bit.
    assert torch.allclose(again.stem.bias, plan.stem.bias, rtol=0, atol=1e-5)
