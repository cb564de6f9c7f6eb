"""The prediction's arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fastres.architectures import get_architecture
from fastres.bench.predict import main, parts, prediction
from fastres.ceilings import Ceilings
from fastres.folding import outline


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
