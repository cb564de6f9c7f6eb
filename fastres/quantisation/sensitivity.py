"""The sensitivity of each step: the error of the network's outputs if this step alone is computed in 8 bit."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastres.network.plan import INPUT, LOGITS, POOLED, Head, Plan, Step

from .comparison import compare
from .rounding import quantisable
from .simulation import Simulation

FLOPS = 1e12  # what all steps together may take, as long as there are LEAST images
LEAST, MOST = 2, 16  # images


def images_for(plan: Plan, height: int, width: int) -> int:
    """Return the number of images on which all steps are measured. It bounds the time, and is the same everywhere."""
    flops = sum(cost.flops for cost in plan.costs(1, height, width))
    return max(LEAST, min(MOST, int(FLOPS / (flops * len(quantisable(plan)) / 2))))


def sensitivities(
    plan: Plan, quantised: Plan, pixels: Tensor, advance: Callable[[int], None] = lambda images: None
) -> dict[str, float]:
    """Return the relative error of the outputs for each step that is in 8 bit in ``quantised``.

    The step reads and writes rounded values and has rounded weights; all others are those of ``plan``, in float32. The
    steps before it are computed only once. ``advance`` is called with the number of images after each step.
    """
    assert quantised.quantisation is not None
    output = LOGITS if plan.head.weight.shape[0] else POOLED
    exact, rounded = Simulation(plan), Simulation(quantised)
    truth = exact.run(pixels, (output,))[0]
    values: dict[str, Tensor] = {INPUT: pixels}
    found = {}
    for index, (original, step) in enumerate(zip(plan, quantised, strict=True)):
        if step.name in quantised.quantisation.weights:
            inside = {name: values[name] for name in step.reads}
            if not isinstance(step, Head):  # which rounds the pooled features, not what it reads
                inside = {n: v if n == INPUT else rounded.rounded_(v.clone(), n) for n, v in inside.items()}
            after = values | rounded.step(step, inside)
            found[step.name] = compare(_rest(exact, index, after, output), truth, classes=False).logit_error
            advance(len(pixels))
        values.update(exact.step(original, values))
        exact.forget(values, index)
    return found


def _rest(exact: Simulation, index: int, values: dict[str, Tensor], output: str) -> Tensor:
    """Run the steps after the ``index``-th on ``values`` and return the ``output``."""
    steps: tuple[Step, ...] = exact.plan.steps
    values = dict(values)
    if index + 1 < len(steps):
        exact.forget(values, index)
    for later in range(index + 1, len(steps)):
        values.update(exact.step(steps[later], values))
        if later + 1 < len(steps):
            exact.forget(values, later)
    return values[output]
