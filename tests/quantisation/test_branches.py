"""The scales of residual convolutions' results before the addition."""

from __future__ import annotations

import pytest
import torch

from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.executors.cpu import CpuExecutor
from fastres.folding.build import build_plan
from fastres.kernels import reference
from fastres.network.architectures import get_architecture
from fastres.network.plan import Conv
from fastres.network.quantisation import LARGEST, Scale
from fastres.quantisation.branches import (
    branch_of,
    branch_ranges,
    branch_scale,
    residual_convolutions,
    with_branch_scales,
    with_branches,
)
from fastres.quantisation.rounding import quantise_plan
from tests.quantisation.simple import scales_of


@pytest.mark.parametrize("residual", [Scale(0.02), Scale(0.05, 100), Scale(1e-6), Scale(3.0, 255)])
def test_no_branch_is_cut_off_that_matters(residual: Scale) -> None:
    """Any branch, cut to its levels' range, gives the same level of the sum as the branch itself."""
    total = Scale(0.03)
    branch = branch_scale(residual, total)
    least, largest = branch.range
    assert branch.scale == pytest.approx((total.scale + residual.scale) * LARGEST / (LARGEST - 1))
    values = torch.linspace(-2e3, 2e3, 10_001, dtype=torch.float64, device="cpu")[:, None]
    residuals = residual.scale * (torch.arange(256, dtype=torch.float64, device="cpu") - residual.zero_point)
    expected = reference.quantised((values + residuals).relu(), total.scale)
    assert torch.equal(reference.quantised((values.clamp(least, largest) + residuals).relu(), total.scale), expected)
    assert set(expected.unique().tolist()) >= {0, 255}


def test_a_measured_branch_has_finer_levels_around_its_range() -> None:
    branch = branch_scale(Scale(0.02), Scale(0.02), (-1.0, 0.5))
    least, largest = branch.range
    assert -1.4 < least < -1.3
    assert 0.85 < largest < 0.9
    assert branch_scale(Scale(0.02), Scale(0.02), (-100.0, 100.0)) == branch_scale(Scale(0.02), Scale(0.02))
    # 0 always has a level, and a range of one number is no error.
    assert branch_scale(Scale(0.02), Scale(0.02), (0.5, 0.6)).range[0] == 0
    assert branch_scale(Scale(0.02), Scale(0.02), (0.0, 0.0)) == Scale(0.02)


def test_branches_of_a_network_are_what_its_convolutions_compute() -> None:
    network = calibrated(get_architecture("resnet20"))
    plan = build_plan(network.state_dict(), network.architecture)
    x = pixels(smooth_images(4, 32, 32))
    steps = residual_convolutions(plan)
    assert [step.name for step in steps] == [f"layer{n}.{m}.conv2" for n in (1, 2, 3) for m in range(3)]
    names = [f"{step.name}.branch" for step in steps]
    found = CpuExecutor(with_branches(plan)).run(x, (*names, "logits"))
    assert torch.equal(found[-1], CpuExecutor(plan).run(x)[0])
    last = steps[-1]
    (source,) = CpuExecutor(plan).run(x, (last.input,))
    alone = torch.nn.functional.conv2d(source, last.weight.permute(0, 3, 1, 2), last.bias, padding=1)
    torch.testing.assert_close(found[-2], alone, rtol=1e-4, atol=1e-5)
    halves = [dict(zip(names, CpuExecutor(with_branches(plan)).run(part, names), strict=True)) for part in x.split(2)]
    ranges = branch_ranges(halves)
    assert ranges[last.name] == pytest.approx((float(alone.min()), float(alone.max())), rel=1e-4)
    quantised = with_branch_scales(quantise_plan(plan, scales_of(plan, x), keep=(last.name,)), ranges)
    assert quantised.quantisation is not None
    assert set(quantised.quantisation.branches) == {step.name for step in steps[:-1]}
    first = next(step for step in quantised if step.name == steps[0].name)
    assert isinstance(first, Conv)
    assert branch_of(first, quantised.quantisation) == quantised.quantisation.branches[first.name]
