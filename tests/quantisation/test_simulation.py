"""The simulation against the reference executor, and what is measured on a float network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastres.errors import CalibrationError
from fastres.executors.cpu import CpuExecutor
from fastres.executors.reference import ReferenceExecutor
from fastres.network.plan import LOGITS, POOLED, Plan
from fastres.quantisation.observation import observe
from fastres.quantisation.rounding import quantisable, quantise_plan
from fastres.quantisation.simulation import Simulation
from tests.measures import relative_error

from .networks import NETWORKS, float_plan, pictures


@pytest.mark.parametrize("name", NETWORKS)
def test_the_simulation_of_a_float_plan_is_the_float_network(name: str) -> None:
    plan, x = float_plan(name), pictures(3)
    for found, expected in zip(
        Simulation(plan).run(x, (LOGITS, "layer1.0")), CpuExecutor(plan).run(x, (LOGITS, "layer1.0")), strict=True
    ):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_every_step_in_8_bit_is_that_of_the_reference(name: str, kept: int) -> None:
    """Steps are compared on the same inputs: a level that differs would change later ones."""
    plan, x = float_plan(name), pictures(2)
    names = quantisable(plan)
    keep = [(), names[1::2], (names[0], names[-1])][kept]
    quantised = quantise_plan(plan, observe(plan, [x]).scales(plan, "max"), keep)
    assert quantised.quantisation is not None
    reference, simulation = ReferenceExecutor(quantised), Simulation(quantised)
    values = reference.values(x, (LOGITS,))
    real = {name: x if name == "input" else reference._real(values, name).float() for name in values}
    real = {name: value.permute(0, 3, 1, 2) if value.dim() == 4 and name != "input" else value
            for name, value in real.items()}  # fmt: skip
    for step in quantised:
        for value, found in simulation.step(step, real).items():
            scale = quantised.quantisation.values.get(value)
            if scale is None or value == POOLED:
                assert relative_error(found, real[value]) < 1e-5, value
            else:
                off = ((found - real[value]) / scale.scale).abs().round()
                assert off.max() <= 1, value
                assert float(off.mean()) < (0.1 if step.kind == "pool" else 2e-3), value  # averages are often ties


def test_values_are_measured_over_all_batches() -> None:
    plan, x = float_plan("every step"), pictures(6)
    whole, parts = observe(plan, [x]), observe(plan, x.split(2))
    (stem,) = CpuExecutor(plan).run(x, ("layer1.0.conv1",))
    assert float(stem.max()) == pytest.approx(whole.histograms["layer1.0.conv1"].largest, rel=1e-5)
    torch.testing.assert_close(whole.channels["layer1.0.conv1"], stem.amax((0, 2, 3)), rtol=1e-5, atol=1e-6)
    for name, histogram in whole.histograms.items():
        assert histogram.counts.sum() == parts.histograms[name].counts.sum()
        assert histogram.largest == pytest.approx(parts.histograms[name].largest, rel=1e-5)
    scales = whole.scales(plan, "mse")
    pools = [step for step in plan if step.kind == "pool"]
    assert pools
    assert all(scales[pool.input] == scales[pool.output] for pool in pools)


def broken(plan: Plan, value: float) -> Plan:
    """Return ``plan`` with one weight of its third step replaced."""
    steps = list(plan.steps)
    weight = steps[2].weight.clone()
    weight.view(-1)[0] = value
    steps[2] = replace(steps[2], weight=weight)
    return replace(plan, steps=tuple(steps))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(value: float) -> None:
    plan = float_plan("basic")
    with pytest.raises(CalibrationError, match=rf"weights of {plan.steps[2].name} are NaN or infinite"):
        observe(broken(plan, value), [pictures(1)])


def test_an_overflow_is_named_with_the_value() -> None:
    plan = float_plan("basic")
    with pytest.raises(CalibrationError, match=r"too large for float32 at '|gives NaN at '"):
        observe(broken(plan, 3e38), [pictures(1)])
