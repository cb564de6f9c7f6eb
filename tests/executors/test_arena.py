"""The activation arena: no two live values overlap, and little memory is wasted."""

from __future__ import annotations

import math

import pytest
import torch

from fastres.executors.arena import plan_arena
from fastres.folding.build import outline
from fastres.network.architectures import ARCHITECTURES, get_architecture
from fastres.network.plan import INPUT, Conv, Head, Plan, SqueezeExcite


def live_values(plan: Plan, keep: tuple[str, ...]) -> list[tuple[int, set[str]]]:
    """Yield each step that writes to the arena: its index, and the values that must stay intact while it runs."""
    last = plan.last_reads()
    rows = []
    for index, step in enumerate(plan):
        if isinstance(step, Head):
            continue
        earlier = {s.output for s in plan.steps[:index] if last[s.output] >= index and s.output not in keep}
        rows.append((index, earlier - {INPUT}))
    return rows


@pytest.mark.parametrize("keep", [(), ("layer2.0", "layer1.0", "stem")], ids=["logits", "features"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_live_values_do_not_overlap(name: str, keep: tuple[str, ...]) -> None:
    plan = outline(get_architecture(name), torch.float32)
    shapes = plan.shapes(3, 97, 131)
    arena = plan_arena(plan.steps, shapes, keep)
    assert not set(arena.offsets) & set(keep)
    span = {value: (start, start + math.prod(shapes[value])) for value, start in arena.offsets.items()}
    assert max(end for _, end in span.values()) <= arena.size
    for index, live in live_values(plan, keep):
        step = plan.steps[index]
        if step.output in keep:
            continue
        low, high = span[step.output]
        for value in live:
            other_low, other_high = span[value]
            if low < other_high and other_low < high:
                # The only allowed overlap is exactly on the residual, if no later step reads it.
                assert isinstance(step, (Conv, SqueezeExcite))
                assert value == step.residual
                assert (low, high) == (other_low, other_high)
                assert plan.last_reads()[value] == index


def test_a_residual_read_later_is_not_overwritten() -> None:
    plan = outline(get_architecture("resnet18"), torch.float32)
    shapes = plan.shapes(1, 64, 64)
    inside = plan_arena(plan.steps, shapes).offsets
    assert inside["layer1.0"] == inside["stem"], "the residual's place is reused"
    kept = plan_arena(plan.steps, shapes, keep=("stem",)).offsets
    assert "stem" not in kept


@pytest.mark.parametrize("name", ["resnet50", "resnet34", "resnext101_64x4d", "wide_resnet50_2"])
def test_little_is_wasted(name: str) -> None:
    plan = outline(get_architecture(name), torch.float32)
    shapes = plan.shapes(8, 224, 224)
    arena = plan_arena(plan.steps, shapes)
    most = 0
    for index, live in live_values(plan, ()):
        step = plan.steps[index]
        values = live | ({step.output} if not (isinstance(step, Conv) and step.residual in live) else set())
        most = max(most, sum(math.prod(shapes[value]) for value in values))
    assert arena.size <= 1.2 * most
    assert arena.size < sum(math.prod(shapes[step.output]) for step in plan) / 4
