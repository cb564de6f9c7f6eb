"""Bias correction: removes the mean error that rounding adds to each output channel.

Rounding the weights of a channel changes the mean of its sums, because the inputs are not centred; and so does clipping
its inputs. The mean error is measured step by step, with the inputs that the network in 8 bit has after the steps
before have been corrected, and taken off the bias. After Nagel et al., ICCV 2019.

It is the median over the images of an image's mean error. One image with large values, which are clipped, would shift
the mean over all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastres.network.plan import INPUT, LOGITS, Conv, Head, Plan, Stem, Step

from .simulation import Simulation


def corrected(plan: Plan, quantised: Plan, pixels: Tensor) -> Plan:
    """Return ``quantised`` with corrected biases; ``plan`` is the same network in float32.

    ``pixels`` ``[N, 3, H, W]`` are calibration images, all in one batch: both networks' values are in memory.
    """
    assert quantised.quantisation is not None
    exact, rounded = Simulation(plan), Simulation(quantised)
    truth: dict[str, Tensor] = {INPUT: pixels}
    values: dict[str, Tensor] = {INPUT: pixels}
    steps: list[Step] = []
    for index, (original, step) in enumerate(zip(plan, quantised, strict=True)):
        if step.name in quantised.quantisation.weights:
            wanted, found = _sums(exact, original, truth), _sums(rounded, step, values)
            step = replace(step, bias=step.bias - (found - wanted).median(0).values.to(step.bias.dtype))
        steps.append(step)
        truth.update(exact.step(original, truth))
        values.update(rounded.step(step, values))
        exact.forget(truth, index)
        rounded.forget(values, index)
    return replace(quantised, steps=tuple(steps))


def _sums(simulation: Simulation, step: Step, values: dict[str, Tensor]) -> Tensor:
    """Return the mean of each image's output channels before ReLU, in float64 ``[N, K]``."""
    if isinstance(step, Head):
        return simulation.step(step, values)[LOGITS].to(torch.float64)
    assert isinstance(step, (Stem, Conv))
    return simulation.affine(step, values).mean((2, 3), dtype=torch.float64)
