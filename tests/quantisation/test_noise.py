"""The signal-to-noise ratio of each step's output."""

from __future__ import annotations

import math

import pytest

from fastres.executors.cpu import CpuExecutor
from fastres.executors.cpu_int8 import Int8Executor
from fastres.quantisation.noise import signal_to_noise
from fastres.quantisation.rounding import quantisable, quantise_plan
from tests.measures import relative_error

from .networks import float_plan, pictures
from .simple import scales_of


def test_the_ratio_is_that_of_the_outputs() -> None:
    plan, x = float_plan("basic"), pictures(1)
    quantised = quantise_plan(plan, scales_of(plan, x))
    found = signal_to_noise(plan, quantised, x)
    assert set(found) == {step.name for step in plan}
    for step in plan:
        (truth,), (rounded,) = (run.run(x, (step.output,)) for run in (CpuExecutor(plan), Int8Executor(quantised)))
        expected = -20 * math.log10(relative_error(rounded, truth))
        assert found[step.name] == pytest.approx(expected, abs=0.01)
    assert found["stem"] > found["head"] > 10


def test_steps_without_an_error_have_no_ratio() -> None:
    plan, x = float_plan("basic"), pictures(2)
    last = quantisable(plan)[-2]
    quantised = quantise_plan(plan, scales_of(plan, x), [n for n in quantisable(plan) if n != last])
    found = signal_to_noise(plan, quantised, x)
    assert list(found)[-2:] == [last, "head"]
    assert "layer1.0.conv1" not in found
