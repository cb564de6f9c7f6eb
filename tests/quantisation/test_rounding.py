"""Rounding weights to 8 bit, and which values need a scale."""

from __future__ import annotations

import pytest
import torch

from fastres.folding.build import outline
from fastres.network.architectures import get_architecture
from fastres.network.quantisation import WEIGHT_LIMIT, WEIGHT_LIMIT_WITHOUT_VNNI
from fastres.quantisation.rounding import quantisable, quantise_weight, values_in_8_bit


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
