"""The results of residual convolutions before the addition, called *branches*, for engines that add in 8 bit.

The reference adds in float64 and rounds once. ONNX Runtime adds two values in 8 bit, so it rounds the branch as well,
which changes the sum by at most half of a level of the branch. That is less than one level of the sum if the branch's
scale is less than twice the sum's.

If the branch is below minus the largest residual, the sum is below 0, and if it is above the largest sum minus the
least residual, the sum has the largest level. So levels outside this range are not needed, whatever the branch is. Its
scale is then the sum of the other two scales. A branch that was measured on images is usually narrower, and its levels
finer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from fastres.network.plan import Conv, Plan, Step
from fastres.network.quantisation import LARGEST, Quantisation, Scale

# The levels of a measured branch cover its range and this share of the range on each side, for other images.
MARGIN = 0.25


def residual_convolutions(plan: Plan) -> tuple[Conv, ...]:
    """Return the convolutions of ``plan`` that add a residual."""
    return tuple(step for step in plan if isinstance(step, Conv) and step.residual is not None)


def with_branches(plan: Plan) -> Plan:
    """Return a float ``plan`` that also computes each branch, as the value ``branch_name(step.name)``."""

    def steps() -> Iterator[Step]:
        for step in plan:
            if isinstance(step, Conv) and step.residual is not None:
                name = branch_name(step.name)
                yield replace(step, name=name, output=name, residual=None, relu=False)
            yield step

    return replace(plan, steps=tuple(steps()))


def branch_name(step: str) -> str:
    """Return the name of a step's branch in :func:`with_branches` and in files."""
    return f"{step}.branch"


def branch_ranges(written: Iterable[Mapping[str, Tensor]]) -> dict[str, tuple[float, float]]:
    """Return the least and the largest number of each branch, by its step, in values that a plan's steps wrote."""
    found: dict[str, tuple[float, float]] = {}
    for values in written:
        for name, value in values.items():
            if name.endswith(branch_name("")):
                step, (least, largest) = name.removesuffix(branch_name("")), map(float, value.aminmax())
                before = found.get(step, (least, largest))
                found[step] = (min(least, before[0]), max(largest, before[1]))
    return found


def with_branch_scales(plan: Plan, ranges: Mapping[str, tuple[float, float]]) -> Plan:
    """Return a ``plan`` in 8 bit with the scales of its branches, whose least and largest numbers are ``ranges``."""
    quantisation = plan.quantisation
    assert quantisation is not None
    branches = {
        step.name: branch_scale(*_scales(step, quantisation), ranges[step.name])
        for step in residual_convolutions(plan)
        if step.name in quantisation.weights
    }
    return replace(plan, quantisation=replace(quantisation, branches=branches))


def branch_of(step: Conv, quantisation: Quantisation) -> Scale:
    """Return the scale of the branch of ``step``, a residual convolution in 8 bit, measured or not."""
    known = quantisation.branches.get(step.name)
    return branch_scale(*_scales(step, quantisation)) if known is None else known


def branch_scale(residual: Scale, total: Scale, measured: tuple[float, float] | None = None) -> Scale:
    """Return the scale of a branch from those of the ``residual`` and of the sum, and from its ``measured`` range."""
    least, largest = -residual.range[1], total.range[1] - residual.range[0]
    if measured is not None:
        margin = MARGIN * (measured[1] - measured[0])
        least = max(least, min(measured[0] - margin, 0.0))
        largest = min(largest, max(measured[1] + margin, 0.0))
    if largest <= least:  # nothing but zeros
        return Scale(total.scale)
    # With one level to spare, both ends have levels although 0 has one too.
    scale = (largest - least) / (LARGEST - 1)
    return Scale(scale, math.ceil(-least / scale))


def _scales(step: Conv, quantisation: Quantisation) -> tuple[Scale, Scale]:
    assert step.residual is not None
    return quantisation.values[step.residual], quantisation.values[step.output]
