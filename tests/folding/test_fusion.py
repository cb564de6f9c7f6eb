"""Joined plans compute the same as the plan, and the chosen runs are those that save most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fastres.bench.measure.calibration import calibrated, smooth_images, spread
from fastres.folding.build import build_plan, outline
from fastres.folding.fusion import join, joinable
from fastres.network.architectures import ARCHITECTURES, get_architecture
from fastres.network.plan import Conv, Joined, Plan
from tests.measures import relative_error
from tests.network.reference_plan import run_plan


def everything(run: Joined) -> float:
    """Longer runs save more."""
    return len(run.parts) - 0.5


def plan_of(name: str) -> Plan:
    """Everything is in float64, so that sums of biases are exact too."""
    arch = get_architecture(name)
    plan = build_plan(calibrated(arch).state_dict(), arch, dtype=torch.float64)
    return replace(plan, steps=tuple(replace(step, bias=step.bias.double()) for step in plan))


def shortcuts(run: Joined) -> float:
    return float(run.first is None)


def blocks(run: Joined) -> float:
    return float(run.first is not None and run.following is None)


@pytest.mark.parametrize(
    ("name", "choose"),
    [("resnet18", everything), ("resnet20", shortcuts), ("resnet50", everything), ("resnet50", blocks)],
)
def test_joined_plans_compute_the_same(name: str, choose: Callable[[Joined], float]) -> None:
    plan = plan_of(name)
    joined = join(plan, choose)
    assert len(joined) < len(plan)
    x = smooth_images(2, 33, 47, seed=3).double()
    truth, found = run_plan(plan, x), run_plan(joined, x)
    assert spread(truth["logits"]) > 0.2
    for value in found:
        assert relative_error(found[value], truth[value]) < 1e-12, value
    hidden = set(truth) - set(found)
    assert hidden == {part.output for step in joined for part in step.parts} - {v for s in joined for v in s.writes}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_splitting_gives_the_plan_back(name: str) -> None:
    plan = outline(get_architecture(name), torch.float16)
    joined = join(plan, everything)
    assert tuple(part for step in joined for part in step.parts) == plan.steps
    shapes, joined_shapes = plan.shapes(2, 65, 97), joined.shapes(2, 65, 97)
    assert joined_shapes.items() <= shapes.items()


def test_what_a_resnet50_joins() -> None:
    plan = outline(get_architecture("resnet50"), torch.float16)
    runs = [run for found in joinable(plan.steps).values() for run in found]
    # 16 blocks. Each has a run from its 3×3, with or without the next block's 1×1 (the last block has no next), and
    # there are 4 merged shortcuts.
    assert len(runs) == 16 + 15 + 4
    assert sum(run.shortcut is not None for run in runs) == 4 + 4 + 4
    joined = join(plan, everything)
    assert [len(step.parts) for step in joined] == [1, 1, 4, 3, 3, 4, 3, 3, 3, 4, 3, 3, 3, 3, 3, 4, 3, 2, 1]


def test_grouped_and_plain_networks_join_what_they_can() -> None:
    assert not joinable(outline(get_architecture("plain34"), torch.float16).steps)
    runs = [run for found in joinable(outline(get_architecture("resnext50_32x4d"), torch.float16).steps).values()
            for run in found]  # fmt: skip
    assert runs
    assert all(run.first is None for run in runs), "grouped 3×3 convolutions are not joined"


def test_joining_moves_fewer_bytes_and_multiplies_as_much() -> None:
    plan = outline(get_architecture("resnet50"), torch.float16)
    joined = join(plan, everything)
    before, after = plan.costs(256), joined.costs(256)
    assert sum(cost.flops for cost in after) == sum(cost.flops for cost in before)
    assert sum(cost.bytes for cost in after) < 0.75 * sum(cost.bytes for cost in before)


def test_values_to_keep_are_written() -> None:
    plan = outline(get_architecture("resnet50"), torch.float16)
    inner = "layer1.1.conv2"
    assert inner not in {value for step in join(plan, everything) for value in step.writes}
    assert inner in {value for step in join(plan, everything, keep=(inner,)) for value in step.writes}
    features = set(plan.features.values())
    assert features <= {value for step in join(plan, everything) for value in step.writes}


def test_the_cover_saves_most() -> None:
    """If runs overlap, the pair that saves more together wins over the single best run."""
    plan = outline(get_architecture("resnet50"), torch.float16)

    def saves(run: Joined) -> float:
        # layer1.0's run takes the next block's first convolution. layer1.1's run does not need it, so nothing is lost.
        worth = {("layer1.0.conv2", True): 5.0, ("layer1.0.conv2", False): 4.0, ("layer1.1.conv2", False): 3.0}
        first = "" if run.first is None else run.first.name
        return worth.get((first, run.following is not None), -1.0)

    joined = [step for step in join(plan, saves) if isinstance(step, Joined)]
    assert [(step.parts[0].name, step.following is not None) for step in joined] == [
        ("layer1.0.conv2", True),
        ("layer1.1.conv2", False),
    ]

    def overlapping(run: Joined) -> float:
        if run.first is None:
            return 4.0 if run.last.name == "layer1.0.conv3" else 0.0
        return 3.0 if run.last.name == "layer1.0.conv3" and run.following is None else 0.0

    (only,) = [step for step in join(plan, overlapping) if isinstance(step, Joined)]
    assert only.first is None
    assert only.parts[0].name == "layer1.0.downsample"


def test_nothing_that_saves_nothing_is_joined() -> None:
    plan = outline(get_architecture("resnet50"), torch.float16)
    assert join(plan, lambda run: 0.0).steps == plan.steps
    assert all(isinstance(step, Conv) for step in join(plan, lambda run: -1.0).steps[1:-1])
