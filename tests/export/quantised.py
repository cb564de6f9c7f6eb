"""Models in 8 bit for the export tests, with the scales of one batch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.bench.digits.data import load_digits
from fastres.bench.measure.calibration import pixels, smooth_images
from fastres.executors.cpu import CpuExecutor
from fastres.model.quantized import QuantizedModel
from fastres.network.plan import Plan
from fastres.network.quantisation import WEIGHT_LIMIT_WITHOUT_VNNI
from fastres.quantisation.branches import (
    branch_name,
    branch_ranges,
    residual_convolutions,
    with_branch_scales,
    with_branches,
)
from fastres.quantisation.rounding import quantise_plan
from tests.quantisation.simple import scales_of

from .networks import digits_model, every_step_model, network


def quantised_plan(
    plan: Plan, x: Tensor, keep: Collection[str] = (), limit: int = WEIGHT_LIMIT_WITHOUT_VNNI, measured: bool = True
) -> Plan:
    """Return ``plan`` in 8 bit with scales from ``x``; ``limit`` suits every processor."""
    quantised = quantise_plan(plan, scales_of(plan, x), keep, limit)
    if not measured:
        return quantised
    names = [branch_name(step.name) for step in residual_convolutions(plan)]
    branches = CpuExecutor(with_branches(plan)).run(x, names) if names else []
    return with_branch_scales(quantised, branch_ranges([dict(zip(names, branches, strict=True))]))


@dataclass(frozen=True)
class Known:
    """A model in 8 bit, and the images that gave its scales, uint8."""

    model: QuantizedModel
    images: Tensor


def known(name: str, **options: Any) -> Known:
    """Return the network called ``name`` in 8 bit; ``"every step"`` is the network with every kind of step."""
    if name == "resnet20_digits":
        model, x = digits_model(), torch.as_tensor(load_digits()[0])[:64]
    else:
        model = every_step_model() if name == "every step" else network(name).model
        x = pixels(smooth_images(4, 64, 64, seed=5))
    plan = quantised_plan(model.plan_in(torch.float32, "cpu"), x, **options)
    others = {"transforms": model.transforms, "categories": model.categories, "weights": model.weights}
    return Known(QuantizedModel.of_plan(plan, **others, record={"images": {"measured": len(x)}}), x)
