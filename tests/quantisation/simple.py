"""Scales from the largest values of one batch, for tests that need a plan in 8 bit but no calibration."""

from __future__ import annotations

from torch import Tensor

from fastres.executors.cpu import CpuExecutor
from fastres.network.plan import INPUT, Conv, Plan, Pool
from fastres.network.quantisation import LARGEST, Scale
from fastres.quantisation.rounding import quantisable, values_in_8_bit


def scales_of(plan: Plan, x: Tensor) -> dict[str, Scale]:
    """Return a scale for each value of ``plan`` (float32) that can be in 8 bit, from its range on ``x``."""
    names = [name for name in values_in_8_bit(plan, quantisable(plan)) if name != INPUT]
    signed = {step.output for step in plan if isinstance(step, Conv) and not step.relu}
    scales = {}
    for name, value in zip(names, CpuExecutor(plan).run(x, names), strict=True):
        least = min(0.0, float(value.min())) if name in signed else 0.0
        step = (max(float(value.max()), 0.0) - least) / LARGEST or 1.0
        scales[name] = Scale(step, round(-least / step))
    for step in plan:
        if isinstance(step, Pool) and step.output in scales:
            scales[step.output] = scales[step.input]
    return scales
