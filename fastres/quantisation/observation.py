"""Measures the values of a float network on calibration images: their histograms and the largest of each channel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastres.errors import CalibrationError
from fastres.network.plan import INPUT, LOGITS, POOLED, Conv, Plan, Pool
from fastres.network.quantisation import Scale

from .histogram import Histogram
from .rounding import quantisable, values_in_8_bit
from .simulation import Simulation
from .thresholds import scale_of


@dataclass(frozen=True)
class Observations:
    """What a float plan's values were on the calibration images, by name.

    ``histograms`` has the values that can be in 8 bit; ``channels`` the largest absolute value of each channel.
    """

    histograms: Mapping[str, Histogram]
    channels: dict[str, Tensor] = field(default_factory=dict)

    def scales(self, plan: Plan, method: str) -> dict[str, Scale]:
        """Return the scale of each value by ``method``. The input and the output of a pool share one."""
        scales = {name: scale_of(histogram, method) for name, histogram in self.histograms.items()}
        for step in plan:
            if isinstance(step, Pool) and step.output in scales:
                scales[step.output] = scales[step.input]
        return scales


def observe(plan: Plan, batches: Iterable[Tensor]) -> Observations:
    """Run ``plan`` (float32) on ``batches`` of pixels and measure its values.

    Raises ``CalibrationError`` for NaN and infinity, in the weights or in a value.
    """
    check_finite(plan)
    signed = {step.output for step in plan if isinstance(step, Conv) and not step.relu}
    names = [name for name in values_in_8_bit(plan, quantisable(plan)) if name != INPUT]
    observations = Observations({name: Histogram(name in signed) for name in names})
    simulation = Simulation(plan)
    for batch in batches:
        for values in simulation.walk(batch):
            for name, value in values.items():
                _observe(observations, name, value)
    return observations


def _observe(observations: Observations, name: str, value: Tensor) -> None:
    places = (0, 2, 3) if value.dim() == 4 else (0,)
    largest = torch.maximum(value.amax(places), -value.amin(places))
    if not math.isfinite(float(largest.sum())):
        what = "NaN" if bool(largest.isnan().any()) else "a number that is too large for float32"
        raise CalibrationError(
            f"The float32 network gives {what} at {name!r} for a calibration image, so it cannot be quantised. Check "
            "its weights, and that mean and std of its transforms are those it was trained with"
        )
    if name in observations.histograms:
        observations.histograms[name].add(value)
    if name not in (LOGITS, POOLED):
        before = observations.channels.get(name)
        observations.channels[name] = largest if before is None else torch.maximum(before, largest)


def check_finite(plan: Plan) -> None:
    """Raise ``CalibrationError``, which names the steps, if a weight or bias of ``plan`` is NaN or infinite."""
    broken = [
        step.name
        for step in plan
        if not all(bool(tensor.isfinite().all()) for pair in step.parameters for tensor in pair)
    ]
    if broken:
        more = f" and {len(broken) - 3} others" if len(broken) > 3 else ""
        raise CalibrationError(
            f"The float32 weights of {', '.join(broken[:3])}{more} are NaN or infinite, so the network cannot be "
            "quantised. Load a sound checkpoint"
        )
