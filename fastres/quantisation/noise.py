"""The signal-to-noise ratio of each step's output in 8 bit: how errors grow along the network."""

from __future__ import annotations

import math

from torch import Tensor

from fastres.executors.cpu import CpuExecutor
from fastres.executors.cpu_int8 import Int8Executor
from fastres.network.plan import Plan

MOST = 4  # images


def signal_to_noise(plan: Plan, quantised: Plan, pixels: Tensor) -> dict[str, float]:
    """Return decibels for each step: the strength of its output in ``plan`` (float32) over that of its error.

    ``quantised`` computes the output from its own, already wrong, inputs, as it does in use. ``pixels`` are uint8
    ``[N, 3, H, W]``, of which the first few run, one by one. Outputs without any error or signal are left out.
    """
    outputs = [step.output for step in plan]
    signals, errors = (dict.fromkeys(outputs, 0.0) for _ in range(2))
    exact, rounded = CpuExecutor(plan), Int8Executor(quantised)
    if exact.direct is not None:
        exact.direct.lanes = None  # the layout of a plan in 8 bit: steps that stay in float32 are then exactly equal
    for x in pixels[:MOST].split(1):
        for name, truth, found in zip(outputs, exact.run(x, outputs), rounded.run(x, outputs), strict=True):
            signals[name] += float(truth.double().square().sum())
            errors[name] += float((found.double() - truth).square().sum())
    return {
        step.name: 10 * math.log10(signals[step.output] / errors[step.output])
        for step in plan
        if signals[step.output] > 0 and errors[step.output] > 0
    }
