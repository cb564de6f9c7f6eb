"""Float plan and scales → plan in 8 bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastres.network.plan import INPUT, POOLED, Conv, Head, Plan, Pool, Stem, Step
from fastres.network.quantisation import WEIGHT_LIMIT, Quantisation, Scale

PIXELS = Scale(1.0)  # of the input: a level is a pixel


def quantisable(plan: Plan) -> tuple[str, ...]:
    """Return the names of the steps that can be computed in 8 bit: stem, convolutions and classifier, in order."""
    return tuple(step.name for step in plan if isinstance(step, (Stem, Conv)) or _has_classes(step))


def _has_classes(step: Step) -> bool:
    return isinstance(step, Head) and bool(step.weight.shape[0])


def values_in_8_bit(plan: Plan, steps: Collection[str]) -> tuple[str, ...]:
    """Return the values that must have a scale if ``steps`` are computed in 8 bit, in the order of the plan.

    These are the values that such a step reads or writes. A pool does not change the levels: its input and its output
    have the same scale.
    """
    needed = set()
    for step in plan:
        if step.name in steps:
            needed |= {POOLED, step.input} if isinstance(step, Head) else {*step.reads, *step.writes}
    pools = [step for step in plan if isinstance(step, Pool)]
    for step in [*pools, *reversed(pools)]:
        if needed & {step.input, step.output}:
            needed |= {step.input, step.output}
    order = [INPUT, *(value for step in plan for value in step.writes), POOLED]
    return tuple(value for value in order if value in needed)


def quantise_weight(weight: Tensor, limit: int = WEIGHT_LIMIT) -> tuple[Tensor, Tensor]:
    """Round ``weight`` ``[K, …]`` to int8, from -``limit`` to ``limit``; return it and its float32 scales ``[K]``.

    The largest weight of each output channel gets the largest level. A channel of zeros has scale 1.
    """
    largest = weight.double().flatten(1).abs().amax(1)
    scale = torch.where(largest > 0, largest / limit, 1.0).to(torch.float32)
    levels = weight.double() / scale.double().view(-1, *[1] * (weight.dim() - 1))
    return levels.round().clamp(-limit, limit).to(torch.int8), scale


def quantise_plan(
    plan: Plan, scales: Mapping[str, Scale], keep: Collection[str] = (), limit: int = WEIGHT_LIMIT
) -> Plan:
    """Return ``plan`` (float32) with all steps that can be computed in 8 bit in 8 bit, except those in ``keep``.

    ``scales`` has the scale of each value that needs one (:func:`values_in_8_bit`), except ``"input"``.
    """
    names = [name for name in quantisable(plan) if name not in keep]
    values = {name: PIXELS if name == INPUT else scales[name] for name in values_in_8_bit(plan, names)}
    weights: dict[str, Tensor] = {}
    steps: list[Step] = []
    for step in plan:
        if step.name in names:
            rounded = quantise_stem(step, limit) if isinstance(step, Stem) else quantise_weight(step.weight, limit)
            weight, weights[step.name] = rounded
            bias = stem_bias(step, *rounded) if isinstance(step, Stem) else step.bias
            step = replace(step, weight=weight, bias=bias)
        steps.append(step)
    return replace(plan, steps=tuple(steps), quantisation=Quantisation(values, weights))


def quantise_stem(step: Stem, limit: int = WEIGHT_LIMIT) -> tuple[Tensor, Tensor]:
    """Return the stem's weights for pixels, in 8 bit, and their scales: the normalisation is part of the weights."""
    std = torch.tensor(step.std, dtype=torch.float64, device=step.weight.device)
    return quantise_weight(step.weight.double() / (255 * std), limit)


def stem_bias(step: Stem, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the stem's bias for pixels: a picture in the mean colour gives the float stem's bias exactly."""
    mean = torch.tensor(step.mean, dtype=torch.float64, device=weight.device)
    shift = (weight.double() * (255 * mean)).sum((1, 2, 3)) * scale.double()
    return (step.bias.double() - shift).to(torch.float32)


def dequantised(plan: Plan) -> Plan:
    """Return the float32 plan whose weights are what those of a ``plan`` in 8 bit stand for."""
    assert plan.quantisation is not None
    steps: list[Step] = []
    for step in plan:
        scale = plan.quantisation.weights.get(step.name)
        if scale is not None:
            weight, bias = step.weight.double() * scale.double().view(-1, *[1] * (step.weight.dim() - 1)), step.bias
            if isinstance(step, Stem):
                mean, std = (
                    torch.tensor(values, dtype=torch.float64, device=weight.device) * 255
                    for values in (step.mean, step.std)
                )
                bias = (bias.double() + (weight * mean).sum((1, 2, 3))).to(torch.float32)
                weight = weight * std
            step = replace(step, weight=weight.to(torch.float32), bias=bias)
        steps.append(step)
    return replace(plan, steps=tuple(steps), quantisation=None)
