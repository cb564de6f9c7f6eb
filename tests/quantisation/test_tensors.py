"""A plan in 8 bit as named tensors, and back."""

from __future__ import annotations

import functools

import pytest
import torch

from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.errors import ArchitectureError
from fastres.folding.build import build_plan
from fastres.network.architectures import get_architecture
from fastres.network.plan import Plan
from fastres.quantisation.branches import residual_convolutions, with_branch_scales
from fastres.quantisation.rounding import quantisable, quantise_plan
from fastres.quantisation.tensors import plan_of, tensors_of
from tests.quantisation.simple import scales_of


@functools.lru_cache(maxsize=1)
def quantised(name: str, every: int = 0) -> Plan:
    network = calibrated(get_architecture(name))
    plan = build_plan(network.state_dict(), network.architecture)
    keep = quantisable(plan)[::every] if every else ()
    found = quantise_plan(plan, scales_of(plan, pixels(smooth_images(1, 64, 64))), keep)
    return (
        with_branch_scales(found, {step.name: (-1.0, 2.0) for step in residual_convolutions(plan)}) if every else found
    )


@pytest.mark.parametrize("name", ["resnet20", "seresnet50", "resnet26d", "resnext50_32x4d"])
@pytest.mark.parametrize("every", [0, 1, 3])
def test_a_plan_survives(name: str, every: int) -> None:
    plan = quantised(name, every)
    again = plan_of(tensors_of(plan), plan.architecture, plan.stem.mean, plan.stem.std)
    assert plan.quantisation is not None
    assert again.quantisation is not None
    assert dict(again.quantisation.values) == dict(plan.quantisation.values)
    assert dict(again.quantisation.branches) == dict(plan.quantisation.branches)
    assert set(again.quantisation.weights) == set(plan.quantisation.weights)
    for name, scale in plan.quantisation.weights.items():
        assert torch.equal(again.quantisation.weights[name], scale)
    for one, two in zip(again, plan, strict=True):
        assert (one.name, one.reads, one.writes) == (two.name, two.reads, two.writes)
        for (weight, bias), (expected, expected_bias) in zip(one.parameters, two.parameters, strict=True):
            assert weight.dtype == expected.dtype
            assert torch.equal(weight, expected)
            assert torch.equal(bias, expected_bias)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layer1.0.conv1.bias"), "layer1.0.conv1.bias is missing"),
        (lambda t: t.pop("layer1.0.conv1.output_scale"), "layer1.0.conv1.output_scale is missing"),
        (lambda t: t.pop("layer1.0.conv1.scale"), "layer1.0.conv1.weight is int8"),
        (lambda t: t.update({"more": t["head.bias"]}), "more is additional"),
        (lambda t: t.update({"head.bias": t["head.bias"][1:]}), r"head.bias is float32 \[9\], not float32 \[10\]"),
        (lambda t: t.update({"stem.output_scale": -t["stem.output_scale"]}), "a scale is positive"),
        (lambda t: t.update({"stem.output_scale": t["stem.output_scale"] * float("nan")}), "a scale is positive"),
        (lambda t: t.update({"stem.output_zero_point": t["stem.output_zero_point"] + 256}), "from 0 to 255"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words: str) -> None:  # type: ignore[no-untyped-def]
    plan = quantised("resnet20")
    tensors = tensors_of(plan)
    change(tensors)
    with pytest.raises(ArchitectureError, match=words):
        plan_of(tensors, plan.architecture, plan.stem.mean, plan.stem.std)
