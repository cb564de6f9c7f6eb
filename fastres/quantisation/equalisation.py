"""Cross-layer equalisation: moves scale between two convolutions, where only ReLU is between them.

ReLU commutes with positive factors. So a channel of the value between two convolutions can be made smaller, if the
second one's weights for it are made larger by the same factor. The channels of a value share one scale in 8 bit, and so
do the weights of one output channel. The factor of a channel is the square root of ``largest value / largest weight``:
afterwards, both take the same share of their range. After Nagel et al., ICCV 2019, with measured values for the first
range, because the weights of each output channel have their own scale here.

The factors are powers of two, which change no mantissa: the float network gives the same results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastres.network.plan import Conv, Plan, Step

_MOST = 8  # the largest factor is 2 to this power


def pairs(plan: Plan) -> Iterator[tuple[Conv, Conv]]:
    """Yield each convolution with ReLU and without residual, and the convolution that alone reads its value."""
    features = set(plan.features.values())
    for first in plan:
        if not isinstance(first, Conv) or not first.relu or first.residual is not None or first.output in features:
            continue
        readers = [step for step in plan if first.output in step.reads]
        if len(readers) == 1 and isinstance(readers[0], Conv) and readers[0].residual != first.output:
            yield first, readers[0]


def equalised(plan: Plan, channels: Mapping[str, Tensor]) -> Plan:
    """Return ``plan`` (float32) with equalised :func:`pairs`.

    ``channels`` has the largest absolute value of each channel, by the name of the value.
    """
    steps: dict[str, Step] = {step.name: step for step in plan}
    for first, second in pairs(plan):
        factor = _factors(channels[first.output], largest_weights(second))
        before, after = steps[first.name], steps[second.name]
        steps[first.name] = replace(before, weight=before.weight / factor.view(-1, 1, 1, 1), bias=before.bias / factor)
        steps[second.name] = replace(after, weight=after.weight * _by_input(factor, second))
    return replace(plan, steps=tuple(steps[step.name] for step in plan))


def _factors(values: Tensor, weights: Tensor) -> Tensor:
    """Return the factor of each channel; 1 if the channel is always 0 or is not used."""
    ratio = values.double() / weights.double()
    power = (ratio.log2() / 2).round()
    power = power - power[power.isfinite()].median() if bool(power.isfinite().any()) else power
    return torch.where(power.isfinite(), power.clamp(-_MOST, _MOST), 0.0).exp2().to(torch.float32)


def largest_weights(step: Conv) -> Tensor:
    """Return the largest absolute weight of each input channel ``[groups · C]``."""
    k, _, _, c = step.weight.shape
    return step.weight.abs().amax((1, 2)).view(step.groups, k // step.groups, c).amax(1).flatten()


def _by_input(factor: Tensor, step: Conv) -> Tensor:
    """Return the factors of input channels in a shape that multiplies the weight ``[K, R, S, C]``."""
    k, _, _, c = step.weight.shape
    each = factor.view(step.groups, 1, c).expand(-1, k // step.groups, -1)
    return each.reshape(k, 1, 1, c)
