"""Chooses how to quantise a plan: every choice is the one whose outputs are nearest to float32 on images kept apart.

1. The float network runs on the images ``fit``, and its values are measured.
2. Each method for the scales is tried, and the best is taken.
3. Cross-layer equalisation and bias correction are tried, and kept if they are better.
4. The sensitivity of each step is measured. If the error is larger than allowed, the most sensitive steps stay in
   float32: first one, then two, four and so on.

"Better" means a smaller error: the relative error of an image's outputs, in the mean over the images ``choose``, which
are used for nothing else. They run on the executor of this processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.errors import CalibrationError, InputError, near_matches
from fastres.executors.cpu import CpuExecutor
from fastres.executors.cpu_int8 import Int8Executor
from fastres.executors.int8_steps import weight_limit
from fastres.network.plan import LOGITS, POOLED, Plan

from .branches import branch_ranges, residual_convolutions, with_branch_scales, with_branches
from .comparison import compare
from .correction import corrected
from .equalisation import equalised, pairs
from .noise import signal_to_noise
from .observation import Observations, observe
from .rounding import quantisable, quantise_plan
from .sensitivity import images_for, sensitivities
from .simulation import Simulation
from .thresholds import METHODS

AUTO = "auto"
# Bytes of the largest value of one batch. A dozen values of a network can be in memory.
BATCH_BYTES, CORRECTION_BYTES = 24 * 2**20, 48 * 2**20
MOST_CORRECTION_IMAGES = 64

Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class Candidate:
    """One way to quantise, and its error and agreement on the images kept apart for the choice."""

    method: str
    equalised: bool
    corrected: bool
    kept: tuple[str, ...]
    logit_error: float
    agreement: float | None


@dataclass(frozen=True)
class Calibrated:
    """A plan in 8 bit and how it was chosen.

    ``chosen`` is one of ``candidates``. ``sensitivity`` has the error of the outputs if one step alone is in 8 bit, by
    the step's name, the largest first. ``signal_to_noise`` has decibels, see :mod:`fastres.quantisation.noise`.
    """

    plan: Plan
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    sensitivity: dict[str, float]
    signal_to_noise: dict[str, float]


def check_method(method: str) -> None:
    """Raise ``InputError`` unless ``method`` is ``"auto"`` or one of ``METHODS``."""
    if method not in (AUTO, *METHODS):
        raise InputError(f"method is {method!r}; use {', '.join(map(repr, (AUTO, *METHODS)))}")


def check_keep(plan: Plan, keep: Collection[str]) -> tuple[str, ...]:
    """Return the steps to keep in float32, in the plan's order. Raise ``InputError`` for a name of no such step."""
    names = quantisable(plan)
    if isinstance(keep, str):
        keep = (keep,)
    for name in keep:
        if name not in names:
            raise InputError(
                f"keep names {name!r}, which is no step of {plan.architecture.name} that can be in 8 bit."
                f"{near_matches(str(name), names)} print(model.outline) shows the steps"
            )
    if set(names) <= set(keep):
        raise InputError("keep names every step, so nothing would be in 8 bit; leave some out")
    return tuple(name for name in names if name in keep)


def images_to_run(plan: Plan, fit: int, choose: int, size: int, method: str) -> int:
    """Return how many images the search runs, for a progress bar; each step of the sensitivity counts half of one."""
    methods = len(METHODS) if method == AUTO else 1
    steps = len(quantisable(plan)) * min(fit, images_for(plan, size, size)) // 2
    corrections = 2 if any(pairs(plan)) else 1
    observed = corrections + bool(residual_convolutions(plan))
    return (
        observed * fit
        + corrections * min(fit, MOST_CORRECTION_IMAGES)
        + choose * (methods + 2 * corrections - 1)
        + steps
    )


class Search:
    """The choice for one plan (float32). ``fit`` and ``choose`` are pixels, uint8 ``[N, 3, H, W]``.

    ``limit`` is the largest level of a weight, by default that of this processor.

    ``advance`` is called with what is done and the number of images.
    """

    def __init__(
        self,
        plan: Plan,
        fit: Tensor,
        choose: Tensor,
        *,
        limit: int | None = None,
        advance: Advance = lambda phase, images: None,
    ) -> None:
        self._plan, self._fit, self._choose = plan, fit, choose
        self._limit, self._advance = weight_limit() if limit is None else limit, advance
        self._has_classes = bool(plan.head.weight.shape[0])
        self._output = LOGITS if self._has_classes else POOLED
        self._truth = self._outputs(plan, "float32")
        self._tried: list[tuple[Candidate, Plan]] = []

    @torch.no_grad()
    def calibrate(
        self, method: str = AUTO, keep: Collection[str] = (), largest_error: float | None = None
    ) -> Calibrated:
        """Quantise by ``method``, or the best of all, with the steps ``keep`` in float32.

        With ``largest_error``, more steps stay in float32 until the error is at most this. Raises ``CalibrationError``
        if more than half of the steps would have to.
        """
        check_method(method)
        kept = check_keep(self._plan, keep)
        self._tried.clear()
        with torch.autocast(self._fit.device.type, enabled=False):
            observed = self._observe(self._plan)
            for name in METHODS if method == AUTO else (method,):
                self._try(self._plan, observed, name, kept)
            name, base = self._best()[0].method, self._plan
            self._try(base, observed, name, kept, correct=True)
            if any(pairs(self._plan)):
                other = equalised(self._plan, observed.channels)
                found = self._observe(other)
                self._try(other, found, name, kept, equalise=True)
                self._try(other, found, name, kept, equalise=True, correct=True)
                if self._best()[0].equalised:
                    base, observed = other, found
            best, plan = self._best()
            sensitivity = self._sensitivity(base, plan)
            if largest_error is not None and not best.logit_error <= largest_error:
                best, plan = self._keep_more(base, observed, best, sensitivity, largest_error)
            plan = self._with_branches(base, plan)
            noise = signal_to_noise(base, plan, self._choose)
        return Calibrated(plan, best, tuple(candidate for candidate, _ in self._tried), sensitivity, noise)

    def _with_branches(self, plan: Plan, quantised: Plan) -> Plan:
        """Return ``quantised`` with the scales of its branches, which exported files need, measured in ``plan``."""
        if not residual_convolutions(plan):
            return quantised
        simulation = Simulation(with_branches(plan))
        written = (values for batch in self._batches(self._fit, "branches") for values in simulation.walk(batch))
        return with_branch_scales(quantised, branch_ranges(written))

    def _best(self) -> tuple[Candidate, Plan]:
        return min(self._tried, key=lambda tried: tried[0].logit_error)

    def _observe(self, plan: Plan) -> Observations:
        return observe(plan, self._batches(self._fit, "measure"))

    def _try(
        self,
        plan: Plan,
        observed: Observations,
        method: str,
        kept: Sequence[str],
        *,
        equalise: bool = False,
        correct: bool = False,
    ) -> Candidate:
        quantised = quantise_plan(plan, observed.scales(plan, method), kept, self._limit)
        if correct:
            pixels = self._fit[: self._images(CORRECTION_BYTES, MOST_CORRECTION_IMAGES)]
            quantised = corrected(plan, quantised, pixels)
            self._advance("correct", len(pixels))
        difference = compare(self._outputs(quantised, "compare"), self._truth, self._has_classes)
        candidate = Candidate(method, equalise, correct, tuple(kept), difference.logit_error, difference.agreement)
        self._tried.append((candidate, quantised))
        return candidate

    def _sensitivity(self, plan: Plan, quantised: Plan) -> dict[str, float]:
        pixels = self._fit[: images_for(self._plan, *self._fit.shape[2:])]
        found = sensitivities(plan, quantised, pixels, lambda images: self._advance("sensitivity", images // 2))
        return {name: found[name] for name in sorted(found, key=lambda name: -found[name])}

    def _keep_more(
        self, plan: Plan, observed: Observations, best: Candidate, sensitivity: dict[str, float], largest: float
    ) -> tuple[Candidate, Plan]:
        """Keep the most sensitive steps in float32 until the error is at most ``largest``."""
        count, most = 1, len(quantisable(self._plan)) // 2
        least = best.logit_error
        while count <= most:
            kept = check_keep(self._plan, {*best.kept, *list(sensitivity)[:count]})
            candidate = self._try(plan, observed, best.method, kept, equalise=best.equalised, correct=best.corrected)
            if candidate.logit_error <= largest:
                return self._tried[-1]
            least = min(least, candidate.logit_error)
            count *= 2
        raise CalibrationError(
            f"With up to half of its steps in float32, the error of this {plan.architecture.name} is still "
            f"{least:.1%}, but largest_error is {largest:.1%}; allow a larger error, or use float32"
        )

    def _outputs(self, plan: Plan, phase: str) -> Tensor:
        executor = CpuExecutor(plan) if plan.quantisation is None else Int8Executor(plan)
        with torch.no_grad():
            return torch.cat([executor.run(batch, (self._output,))[0] for batch in self._batches(self._choose, phase)])

    def _batches(self, pixels: Tensor, phase: str) -> Iterator[Tensor]:
        for batch in pixels.split(self._images(BATCH_BYTES, len(pixels))):
            yield batch
            self._advance(phase, len(batch))

    def _images(self, largest: int, most: int) -> int:
        """Return how many images run at once, so that no value takes more than ``largest`` bytes; at most ``most``."""
        height, width = self._fit.shape[2:]
        shapes = [self._plan.stem.conv_shape((1, height, width, 3)), *self._plan.shapes(1, height, width).values()]
        return max(1, min(most, largest // (4 * max(map(math.prod, shapes)))))
