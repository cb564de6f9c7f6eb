"""Roofline arithmetic, on steps whose bound can be calculated by hand."""

from __future__ import annotations

import pytest
import torch

from fastres.folding.build import outline
from fastres.network.architectures import get_architecture
from fastres.network.plan import StepCost
from fastres.roofline.bound import roofline
from fastres.roofline.ceilings import Ceilings, step_seconds

MACHINE = Ceilings(tflops=2.0, gb_per_s=100.0)  # 20 FLOPs per byte
COMPUTE_BOUND = StepCost("conv", "conv", (), (), flops=4_000_000_000, bytes=100_000_000)  # 2 ms against 1 ms
MEMORY_BOUND = StepCost("head", "head", (), (), flops=1_000_000, bytes=50_000_000)  # 0.5 µs against 0.5 ms


def test_a_step_is_bound_by_the_slower_of_its_two_ceilings() -> None:
    assert step_seconds(COMPUTE_BOUND, MACHINE) == pytest.approx((2e-3, 1e-3))
    assert roofline([COMPUTE_BOUND], MACHINE).seconds == pytest.approx(2e-3)
    assert roofline([MEMORY_BOUND], MACHINE).seconds == pytest.approx(0.5e-3)


def test_steps_add_up_one_by_one() -> None:
    # Steps run one after another, so it is not max(Σ FLOPs, Σ bytes), which would be 2.0005 ms.
    bound = roofline([COMPUTE_BOUND, MEMORY_BOUND], MACHINE)
    assert bound.seconds == pytest.approx(2.5e-3)
    assert bound.memory_seconds == pytest.approx(0.5e-3)
    assert bound.flops == 4_001_000_000
    assert bound.bytes == 150_000_000


def test_resnet50_has_its_published_arithmetic_and_halves_its_bytes_in_half_precision() -> None:
    plan = outline(get_architecture("resnet50"), torch.float32)
    single, half = (roofline(plan.costs(1, 224, 224, dtype), MACHINE) for dtype in (torch.float32, torch.float16))
    assert single.flops == pytest.approx(2 * 4.09e9, rel=0.01)  # torchvision's table: 4.09 GFLOPS of multiply-adds
    assert half.flops == single.flops
    assert half.bytes == pytest.approx(single.bytes / 2, rel=0.01)
    assert half.seconds < single.seconds


def test_a_faster_machine_lowers_the_bound_in_proportion() -> None:
    costs = outline(get_architecture("resnet18"), torch.float32).costs(4, 64, 96)
    twice = Ceilings(2 * MACHINE.tflops, 2 * MACHINE.gb_per_s)
    assert roofline(costs, twice).seconds == pytest.approx(roofline(costs, MACHINE).seconds / 2)
