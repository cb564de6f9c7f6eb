"""The prediction's arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fastres.architectures import get_architecture
from fastres.bench.predict import joined_plan, main, parts, prediction, tiles_seconds
from fastres.bench.roofline import roofline
from fastres.ceilings import Ceilings
from fastres.folding import outline
from fastres.plan import Joined


def test_parts_are_the_network() -> None:
    costs = outline(get_architecture("resnet50"), torch.float16).costs(1)
    found = parts(costs)
    assert list(found) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert sum(len(members) for members in found.values()) == len(costs)


def test_compute_bound_and_memory_bound() -> None:
    """With endless bandwidth the time is the arithmetic's, with endless arithmetic it is the traffic's."""
    costs = outline(get_architecture("resnet18"), torch.float16).costs(8, 224, 224, torch.float16)
    flops, moved = sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)
    text = prediction("resnet18", 8, 224, torch.float16, Ceilings(1.0, 1e12))
    assert f"roofline: {8 / (flops / 1e12):,.0f} images/s" in text
    text = prediction("resnet18", 8, 224, torch.float16, Ceilings(1e12, 1.0))
    assert f"roofline: {8 / (moved / 1e9):,.0f} images/s" in text


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch", "256"]) == 0
    assert "resnet50, batch 256" in capsys.readouterr().out


def test_joined_plans_have_a_lower_bound() -> None:
    limits = Ceilings(790, 4300)
    plan = outline(get_architecture("resnet50"), torch.float16)
    joined = joined_plan(plan, 256, 224, torch.float16, limits)
    before, after = (roofline(p.costs(256), limits) for p in (plan, joined))
    assert after.flops == before.flops
    assert after.seconds < 0.8 * before.seconds
    # A run of 256 channels or more is not fused: it is bound by arithmetic, and no kernel holds it.
    assert all(step.first is None for step in joined if isinstance(step, Joined) and "layer3" in step.last.name)
    assert len(joined_plan(plan, 8, 224, torch.float16, limits)) > len(joined), "the kernels' tiles are 64 images"
    assert f"{len(joined)} kernels" in prediction("resnet50", 256, 224, torch.float16, limits, joined=True)


def test_split_reductions_shorten_a_batch_of_one() -> None:
    limits = Ceilings(790, 4300)
    plan = outline(get_architecture("resnet50"), torch.float16)
    one = tiles_seconds(plan, 1, 224, torch.float16, limits)
    assert roofline(plan.costs(1), limits).seconds < one < 100e-6
