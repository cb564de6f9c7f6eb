"""The least time that a plan can take on a machine: each step runs at the ceiling that limits it.

    T = Σ over steps of max(FLOPs / (FLOP/s), bytes / (bytes/s))

Bytes are the unavoidable ones (:meth:`fastres.network.plan.Plan.costs`): each step's inputs, weights and outputs are
moved once. An engine that keeps activations in a cache between steps can beat this bound. An engine that runs one step
at a time cannot.
Williams, Waterman, Patterson: *Roofline*, CACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastres.network.plan import StepCost

from .ceilings import Ceilings, step_seconds


@dataclass(frozen=True)
class Roofline:
    """``seconds`` is the bound for one batch, ``memory_seconds`` the part of it in steps that memory limits."""

    seconds: float
    memory_seconds: float
    flops: int
    bytes: int


def roofline(costs: Iterable[StepCost], ceilings: Ceilings) -> Roofline:
    """Return the bound of a whole plan from the costs of its steps."""
    seconds = memory_seconds = 0.0
    flops = moved = 0
    for cost in costs:
        compute, memory = step_seconds(cost, ceilings)
        seconds += max(compute, memory)
        memory_seconds += memory if memory > compute else 0.0
        flops += cost.flops
        moved += cost.bytes
    return Roofline(seconds, memory_seconds, flops, moved)
